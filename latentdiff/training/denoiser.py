"""The denoiser's stage: the diffusion loss on latents, with randomly dropped captions for guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from latentdiff.diffusion import noise
from latentdiff.diffusion.objective import DiffusionLoss
from latentdiff.diffusion.path import Path, Straight
from latentdiff.diffusion.times import Times
from latentdiff.networks.conditions import BESIDE, Conditions
from latentdiff.training.optim import TABLE
from latentdiff.training.order import Order

Key = tuple[int, int]  # (row, epoch): a sample
TIME_BINS = 4  # of the validation loss


class Latents(Protocol):
    """The moments of pictures' latents, which the denoiser learns from."""

    def shape(self, row: int) -> tuple[int, ...]:
        """(C, h, w)."""
        ...

    def batch(self, keys: Sequence[Key]) -> dict[str, Tensor]:
        """The input of `moments` for these samples, which share one shape, on the CPU."""
        ...

    def moments(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Posterior mean and log-variance (B, C, h, w), float32, on the device of the batch."""
        ...


class Captions(Protocol):
    """The captions of samples, as conditions or token ids."""

    def batch(self, keys: Sequence[Key], kept: Sequence[bool]) -> dict[str, Tensor]:
        """The input of `conditions` for these samples, on the CPU; kept: False replaces a caption by the empty one."""
        ...

    def conditions(self, batch: dict[str, Tensor]) -> Conditions:
        """The conditions, or the `ids` for an encoder that is trained too."""
        ...


@dataclass(frozen=True)
class Samples:
    """The training set: latents and captions by row, and the user's names of rows."""

    latents: Latents
    captions: Captions
    name: Callable[[int], str]


class ConditionedNetwork(nn.Module):
    """Backbone and text encoder as one module."""

    def __init__(self, backbone: nn.Module, text_encoder: nn.Module):
        super().__init__()
        self.unet, self.text_encoder = backbone, text_encoder  # checkpoints call every backbone `unet`

    def forward(self, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """x_t (B, C, h, w), times (B,), `ids` (B, L) and other conditions -> output like x_t."""
        others = {name: array for name, array in conditions.arrays.items() if name != "ids"}
        output: Tensor = self.unet(x, t, self.text_encoder(conditions["ids"]).joined(others))
        return output


class BesideNetwork(nn.Module):
    """A backbone that reads the condition `beside` (B, C, h, w) in further channels of x."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.unet = backbone

    def forward(self, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """x_t (B, C, h, w), times (B,) -> output like x_t."""
        others = Conditions({name: array for name, array in conditions.arrays.items() if name != BESIDE})
        output: Tensor = self.unet(torch.cat([x, conditions[BESIDE]], 1), t, others)
        return output


def thaw(text_encoder: nn.Module, *, words: bool) -> None:
    """Make a text encoder trainable; with `words` its table of words too.

    A table of a foreign vocabulary is most of the weights, and only the rows of the captions' few words would change.
    In a table of the captions' own vocabulary a row is the shortest way to learn what a word looks like.
    """
    for name, parameter in text_encoder.named_parameters():
        parameter.requires_grad_(words or TABLE not in name)


@dataclass(frozen=True)
class Draws:
    """The random draws of a sample: their rates, and the purpose that keys them.

    samples: whether latents are samples of the codec's posterior, or its mean.
    """

    seed: int
    times: Times
    caption_dropout: float = 0.0
    noise_offset: float = 0.0
    input_perturbation: float = 0.0
    purpose: str = "training"
    samples: bool = True

    def of(self, row: int, epoch: int, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        """The draws of one sample in one epoch, a function of only these arguments."""
        rng = noise.generator(self.seed, self.purpose, row, epoch)
        t = self.times.draw(rng, epoch)
        sample: dict[str, Any] = {"rows": np.int64(row), "t": t, "kept": np.bool_(rng.random() >= self.caption_dropout)}
        sample["noise"], posterior = rng.standard_normal((2, *shape), dtype=np.float32)
        sample["posterior"] = posterior if self.samples else np.zeros_like(posterior)
        if self.noise_offset:
            offset = rng.standard_normal((shape[0], *[1] * (len(shape) - 1)), dtype=np.float32)
            sample["noise"] = sample["noise"] + np.float32(self.noise_offset) * offset
        if self.input_perturbation:
            sample["perturbation"] = np.float32(self.input_perturbation) * rng.standard_normal(shape, dtype=np.float32)
        return sample


class DenoiserStage:
    """E_t w_t |target - network(x_t, t, caption)|^2 over a set of pictures, each epoch in a new order."""

    divisible = True

    def __init__(
        self,
        module: nn.Module,
        parts: dict[str, nn.Module],
        loss: DiffusionLoss,
        samples: Samples,
        draws: Draws,
        order: Order,
    ):
        self.module, self.parts = module, parts
        self._diffusion_loss, self._samples, self._draws, self._order = loss, samples, draws, order

    @property
    def buckets(self) -> Sequence[np.ndarray]:
        """The rows of each shape."""
        return self._order.buckets

    def batch(self, positions: range) -> dict[str, Tensor]:
        """The samples at these positions of the order."""
        return self.batch_of([self._order.key(position) for position in positions])

    def batch_of(self, keys: Sequence[Key]) -> dict[str, Tensor]:
        """Rows and times (B,), noise and posterior noise (B, C, h, w), and the inputs of latents and captions."""
        latents, captions = self._samples.latents, self._samples.captions
        samples = [self._draws.of(row, epoch, latents.shape(row)) for row, epoch in keys]
        kept = [bool(sample.pop("kept")) for sample in samples]
        stacked = {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in samples[0]}
        return stacked | latents.batch(keys) | captions.batch(keys, kept)

    def loss(self, module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Losses (B,)."""
        conditions = self._samples.captions.conditions(batch)
        return self._diffusion_loss(
            module, self._x0(batch), batch["noise"], batch["t"], conditions, batch.get("perturbation")
        )

    def _x0(self, batch: dict[str, Tensor]) -> Tensor:
        """Latents (B, C, h, w): samples of the posteriors of the codec, or their means."""
        mean, log_variance = self._samples.latents.moments(batch)
        return mean + (0.5 * log_variance).exp() * batch["posterior"]

    def sample_ids(self, positions: range) -> list[str]:
        """The user's names of the pictures."""
        return [self._samples.name(self._order.key(position)[0]) for position in positions]


@torch.no_grad()
def validation_losses(stage: DenoiserStage, bins: int, path: Path, batch_size: int) -> dict[str, float]:
    """The mean loss on all pictures, in each bin of time and in total, with fixed noise for each picture and bin.

    Equal weights give equal numbers. The stage's draws must have this number of bins.
    """
    stage.module.eval()
    device = next(stage.module.parameters()).device
    means = []
    for number in range(bins):
        losses = []
        for rows in stage.buckets:
            for first in range(0, len(rows), batch_size):
                batch = stage.batch_of([(int(row), number) for row in rows[first : first + batch_size]])
                losses.append(stage.loss(stage.module, {name: tensor.to(device) for name, tensor in batch.items()}))
        means.append(float(torch.cat(losses).mean()))
    shares = np.arange(bins + 1) / bins
    if isinstance(path, Straight):
        shares = path.shifted(shares)  # as the times are
    edges = [int(edge) for edge in np.round(path.T * shares, 6)]  # with fewer times than bins some are empty
    named = {
        f"loss_at_{low}_to_{high - 1}": value
        for low, high, value in zip(edges, edges[1:], means, strict=False)
        if low < high
    }
    return {"validation_loss": float(np.mean(means)), **named}
