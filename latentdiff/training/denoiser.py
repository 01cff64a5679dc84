"""The denoiser's stage: the diffusion loss on latents, with captions dropped at random for guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from latentdiff.diffusion import noise
from latentdiff.diffusion.objective import DiffusionLoss
from latentdiff.images import to_images


class Latents(Protocol):
    """Pictures as the denoiser learns from them: by row, the moments of their latents."""

    shape: tuple[int, ...]

    def __len__(self) -> int: ...

    def batch(self, rows: list[int]) -> dict[str, Tensor]:
        """What `moments` needs of these rows, on the CPU."""
        ...

    def moments(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Posterior mean and log-variance (B, C, h, w)."""
        ...


class CachedLatents:
    """Moments (N, C, h, w) that were computed once."""

    def __init__(self, mean: Tensor, log_variance: Tensor):
        self.mean, self.log_variance = mean, log_variance
        self.shape = tuple(mean.shape[1:])

    def __len__(self) -> int:
        return len(self.mean)

    def to(self, device: torch.device) -> CachedLatents:
        """The set on a device, so that no picture is sent there again."""
        return CachedLatents(self.mean.to(device), self.log_variance.to(device))

    def batch(self, rows: list[int]) -> dict[str, Tensor]:
        """Nothing beside the rows."""
        return {}

    def moments(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """By row, on the device of the batch."""
        rows = batch["rows"].to(self.mean.device)
        device = batch["noise"].device
        return self.mean[rows].to(device).float(), self.log_variance[rows].to(device).float()


class EncodedLatents:
    """Moments computed anew in every step, by an autoencoder that is not trained."""

    def __init__(
        self,
        pictures: Callable[[list[int]], np.ndarray],
        count: int,
        shape: tuple[int, ...],
        encode: Callable[[Tensor], tuple[Tensor, Tensor]],
    ):
        self._pictures, self._count, self._encode, self.shape = pictures, count, encode, shape

    def __len__(self) -> int:
        return self._count

    def batch(self, rows: list[int]) -> dict[str, Tensor]:
        """Images (B, C, H, W) in [-1, 1]."""
        return {"images": to_images(self._pictures(rows))}

    @torch.no_grad()
    def moments(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Of the images."""
        mean, log_variance = self._encode(batch["images"])
        return mean.float(), log_variance.float()


@dataclass(frozen=True)
class Texts:
    """Captions as the network takes them, token ids (U, L) or contexts (U, L, D), each row's own, and the empty one."""

    values: Tensor
    of_row: Tensor
    empty: Tensor

    def to(self, device: torch.device) -> Texts:
        """The captions on a device."""
        return Texts(self.values.to(device), self.of_row.to(device), self.empty.to(device))

    def chosen(self, rows: Tensor, kept: Tensor) -> Tensor:
        """Those of the rows (B,), or the empty one where not kept (B,), on the device of the rows."""
        where = rows.to(self.of_row.device)
        values = self.values[self.of_row[where]]
        kept = kept.to(values.device).reshape(-1, *[1] * (values.ndim - 1))
        texts = torch.where(kept, values, self.empty)
        return (texts.float() if texts.is_floating_point() else texts).to(rows.device)


class ConditionedNetwork(nn.Module):
    """U-Net and text encoder as one module; the text encoder is trained only where `tune` says so.

    The token embeddings stay as the contrastive stage left them: they are most of the weights, and only the few
    words of the captions would move.
    """

    def __init__(self, unet: nn.Module, text_encoder: nn.Module, tune: bool):
        super().__init__()
        self.unet, self.text_encoder, self.tune = unet, text_encoder, tune
        text_encoder.requires_grad_(tune)
        for name, parameter in text_encoder.named_parameters():
            if "token_embedding" in name:
                parameter.requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """x_t (B, C, h, w), times (B,), token ids (B, L) -> output like x_t."""
        with torch.set_grad_enabled(self.tune and torch.is_grad_enabled()):
            context = self.text_encoder(ids)
        output: Tensor = self.unet(x, t, context)
        return output


@dataclass(frozen=True)
class Draws:
    """What is drawn for a sample beside its place in the order: by which rates, and for which purpose."""

    seed: int
    timesteps: int
    caption_dropout: float = 0.0
    noise_offset: float = 0.0
    input_perturbation: float = 0.0
    purpose: str = "training"
    time_bins: int = 0
    """0 draws every time from all; else epoch e draws from the e-th of so many equal bins, for a validation."""

    def of(self, row: int, epoch: int, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        """The draws of one sample in one epoch: a function of these arguments alone."""
        rng = noise.generator(self.seed, self.purpose, row, epoch)
        t = rng.integers(self.timesteps)
        if self.time_bins:
            t = np.int64((epoch % self.time_bins + rng.random()) * self.timesteps / self.time_bins)
        drawn: dict[str, Any] = {"rows": np.int64(row), "t": t, "kept": np.bool_(rng.random() >= self.caption_dropout)}
        drawn["noise"], drawn["posterior"] = rng.standard_normal((2, *shape), dtype=np.float32)
        if self.noise_offset:
            offset = rng.standard_normal((shape[0], *[1] * (len(shape) - 1)), dtype=np.float32)
            drawn["noise"] = drawn["noise"] + np.float32(self.noise_offset) * offset
        if self.input_perturbation:
            drawn["perturbation"] = np.float32(self.input_perturbation) * rng.standard_normal(shape, dtype=np.float32)
        return drawn


class DenoiserStage:
    """E_t w_t |target - network(x_t, t, caption)|^2 over a set of pictures, each epoch in a new order."""

    divisible = True

    def __init__(
        self,
        module: nn.Module,
        parts: dict[str, nn.Module],
        loss: DiffusionLoss,
        latents: Latents,
        texts: Texts,
        draws: Draws,
    ):
        self.module, self.parts = module, parts
        self._diffusion_loss, self._latents, self._texts, self._draws = loss, latents, texts, draws
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def _key(self, position: int) -> tuple[int, int]:
        """(row, epoch) of a position in the endless sequence of samples."""
        epoch, offset = divmod(position, len(self._latents))
        if self._order[0] != epoch:
            order = noise.permutation(len(self._latents), self._draws.seed, f"{self._draws.purpose} order", epoch)
            self._order = (epoch, order)
        return int(self._order[1][offset]), epoch

    def batch(self, positions: range) -> dict[str, Tensor]:
        """Rows, times, captions kept (B,), noise and posterior noise (B, C, h, w), and what the latents need."""
        keys = [self._key(position) for position in positions]
        drawn = [self._draws.of(row, epoch, self._latents.shape) for row, epoch in keys]
        stacked = {name: torch.from_numpy(np.stack([sample[name] for sample in drawn])) for name in drawn[0]}
        return stacked | self._latents.batch([row for row, _ in keys])

    def loss(self, module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Losses (B,)."""
        mean, log_variance = self._latents.moments(batch)
        x0 = mean + (0.5 * log_variance).exp() * batch["posterior"]
        texts = self._texts.chosen(batch["rows"], batch["kept"])
        return self._diffusion_loss(module, x0, batch["noise"], batch["t"], texts, batch.get("perturbation"))

    def sample_ids(self, positions: range) -> list[str]:
        """Rows of the set."""
        return [f"picture {self._key(position)[0]}" for position in positions]


@torch.no_grad()
def validation_losses(stage: DenoiserStage, count: int, bins: int, timesteps: int, batch_size: int) -> dict[str, float]:
    """The mean loss on `count` pictures by bins of time, each with noise of its own that never changes, and of all.

    The same numbers whenever the weights are the same: the stage's draws must be of `time_bins` = bins.
    """
    stage.module.eval()
    device = next(stage.module.parameters()).device
    means = []
    for number in range(bins):
        first, last = number * count, (number + 1) * count
        losses = []
        for position in range(first, last, batch_size):
            batch = stage.batch(range(position, min(position + batch_size, last)))
            losses.append(stage.loss(stage.module, {name: tensor.to(device) for name, tensor in batch.items()}))
        means.append(float(torch.cat(losses).mean()))
    edges = [number * timesteps // bins for number in range(bins + 1)]
    named = {f"loss_at_{low}_to_{high - 1}": value for low, high, value in zip(edges, edges[1:], means, strict=False)}
    return {"validation_loss": float(np.mean(means)), **named}
