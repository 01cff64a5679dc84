"""Prior preservation: the instance's pictures, and pictures of its class (Ruiz et al. 2023, eq. 2).

E |target - network(instance)|^2 + weight E |target - network(prior)|^2
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from latentdiff.training.denoiser import DenoiserStage
from latentdiff.training.loader import Batch

_PRIOR = "prior."  # before the names of its tensors in a batch


class PriorStage:
    """A position stands for a sample of each set; the two may differ in size."""

    divisible = True

    def __init__(self, instance: DenoiserStage, prior: DenoiserStage, weight: float):
        self._instance, self._prior, self._weight = instance, prior, weight

    @property
    def module(self) -> nn.Module:
        """The network, which both share."""
        return self._instance.module

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The parts of the instance's stage."""
        return self._instance.parts

    def batch(self, positions: range) -> Batch:
        """The samples of both at these positions of their orders."""
        prior = {_PRIOR + name: tensor for name, tensor in self._prior.batch(positions).items()}
        return self._instance.batch(positions) | prior

    def loss(self, module: nn.Module, batch: Any) -> Tensor:
        """Losses (B,)."""
        own = {name: tensor for name, tensor in batch.items() if not name.startswith(_PRIOR)}
        prior = {name.removeprefix(_PRIOR): tensor for name, tensor in batch.items() if name.startswith(_PRIOR)}
        return self._instance.loss(module, own) + self._weight * self._prior.loss(module, prior)

    def sample_ids(self, positions: range) -> list[str]:
        """The user's names of both pictures of each position."""
        pairs = zip(self._instance.sample_ids(positions), self._prior.sample_ids(positions), strict=True)
        return [f"{instance} with {prior}" for instance, prior in pairs]
