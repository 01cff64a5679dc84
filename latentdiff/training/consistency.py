"""The stage of a student, whose loss replaces the diffusion loss; its teacher is the model before training.

See diffusion/consistency, diffusion/easy_consistency and diffusion/mean_flow.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from latentdiff.diffusion import noise
from latentdiff.diffusion.consistency import ConsistencyLoss
from latentdiff.diffusion.easy_consistency import EasyConsistencyLoss
from latentdiff.diffusion.mean_flow import MeanFlowLoss
from latentdiff.training.denoiser import DenoiserStage, Draws, Key, Samples
from latentdiff.training.order import Order

_EMPTY = "empty."  # before the names of the empty prompt's tensors in a batch


class ConsistencyStage(DenoiserStage):
    """E of a student's loss over a set of pictures. teacher: the model before training, frozen.

    guidance: the range of guidance scales, if the student reads one.
    """

    def __init__(
        self,
        module: nn.Module,
        parts: dict[str, nn.Module],
        loss: ConsistencyLoss | EasyConsistencyLoss | MeanFlowLoss,
        teacher: nn.Module,
        samples: Samples,
        draws: Draws,
        order: Order,
        guidance: tuple[float, float] | None = None,
    ):
        self.module, self.parts = module, parts
        self._consistency, self._teacher = loss, teacher.requires_grad_(False).eval()
        self._samples, self._draws, self._order, self._guidance = samples, draws, order, guidance

    def batch_of(self, keys: Sequence[Key]) -> dict[str, Tensor]:
        """DenoiserStage's batch with two levels or times in place of each time, and the empty prompt's conditions."""
        batch = super().batch_of(keys)
        generators = [self._generator("levels", *key) for key in keys]
        pairs = zip(batch.pop("t"), generators, strict=True)
        levels = torch.stack([self._consistency.rows(float(t), rng) for t, rng in pairs])
        empty = self._samples.captions.batch(keys, [False] * len(keys))
        if self._guidance is not None:
            batch["guidance"] = torch.tensor([self._scale(*key) for key in keys], dtype=torch.float32)
        return batch | {"levels": levels} | {_EMPTY + name: tensor for name, tensor in empty.items()}

    def _scale(self, row: int, epoch: int) -> float:
        """The guidance of one sample in one epoch: uniform in the range (Luo et al. 2023, algorithm 1)."""
        assert self._guidance is not None
        return self._generator("guidance", row, epoch).uniform(*self._guidance)

    def _generator(self, what: str, row: int, epoch: int) -> np.random.Generator:
        return noise.generator(self._draws.seed, f"{what} {self._draws.purpose}", row, epoch)

    def loss(self, module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Losses (B,)."""
        own = {name: tensor for name, tensor in batch.items() if not name.startswith(_EMPTY)}
        empty = {name.removeprefix(_EMPTY): tensor for name, tensor in batch.items() if name.startswith(_EMPTY)}
        captions = self._samples.captions
        cond, uncond = captions.conditions(own), captions.conditions(empty)
        x0, scale = self._x0(batch), batch.get("guidance")
        if scale is not None:
            cond = cond.joined({"guidance": scale})
        return self._consistency(module, self._teacher, x0, batch["noise"], batch["levels"], cond, uncond, scale)
