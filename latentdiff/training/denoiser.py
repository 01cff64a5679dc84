"""The denoiser's stage: the diffusion loss on cached latents, with captions dropped at random for guidance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from latentdiff.diffusion import noise
from latentdiff.diffusion.objective import DiffusionLoss


@dataclass(frozen=True)
class LatentSet:
    """Captioned pictures as the denoiser sees them: posterior moments (N, C, h, w) and token ids (N, L)."""

    mean: Tensor
    log_variance: Tensor
    ids: Tensor

    def __len__(self) -> int:
        return len(self.mean)


@dataclass(frozen=True)
class Draws:
    """What is random about one batch: rows of the set, times (B,), noise and posterior noise, captions kept."""

    rows: Tensor
    t: Tensor
    noise: Tensor
    posterior: Tensor
    kept: Tensor


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


class DenoiserStage:
    """E_t w_t |target - network(x_t, t, caption)|^2 over a latent set, each epoch in a new order."""

    def __init__(
        self,
        module: ConditionedNetwork,
        loss: DiffusionLoss,
        latents: LatentSet,
        empty_ids: Tensor,
        *,
        seed: int,
        batch_size: int,
        timesteps: int,
        caption_dropout: float,
        device: torch.device,
    ):
        self.module = module
        self._diffusion_loss, self._latents, self._empty_ids = loss, latents, empty_ids
        self._seed, self._batch_size, self._timesteps = seed, batch_size, timesteps
        self._caption_dropout, self._device = caption_dropout, device
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def draws(self, index: int) -> Draws:
        """The draws of a batch, each keyed by (seed, purpose, sample, epoch)."""
        positions = range(index * self._batch_size, (index + 1) * self._batch_size)
        keys = [self._key(position) for position in positions]
        shape = tuple(self._latents.mean.shape[1:])
        rngs = [noise.generator(self._seed, "training", row, epoch) for epoch, row in keys]
        t = [rng.integers(self._timesteps) for rng in rngs]
        kept = [rng.random() >= self._caption_dropout for rng in rngs]
        drawn = np.stack([rng.standard_normal((2, *shape), dtype=np.float32) for rng in rngs])
        both = torch.from_numpy(drawn)
        return Draws(
            torch.tensor([row for _, row in keys]), torch.tensor(t), both[:, 0], both[:, 1], torch.tensor(kept)
        )

    def _key(self, position: int) -> tuple[int, int]:
        """(epoch, row) of a position in the endless sequence of samples."""
        epoch, offset = divmod(position, len(self._latents))
        if self._order[0] != epoch:
            self._order = (epoch, noise.permutation(len(self._latents), self._seed, "order", epoch))
        return epoch, int(self._order[1][offset])

    def batch(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x0, noise (B, C, h, w), times (B,) and token ids (B, L)."""
        d = self.draws(index)
        std = (0.5 * self._latents.log_variance[d.rows].float()).exp()
        x0 = self._latents.mean[d.rows].float() + std * d.posterior
        ids = torch.where(d.kept[:, None], self._latents.ids[d.rows], self._empty_ids)
        x0, eps, t, ids = (part.to(self._device) for part in (x0, d.noise, d.t, ids))
        return x0, eps, t, ids

    def loss(self, module: nn.Module, batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        """The batch's mean."""
        x0, eps, t, ids = batch
        return self._diffusion_loss(module, x0, eps, t, ids).mean()
