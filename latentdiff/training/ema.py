"""The exponential moving average of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Decay = Callable[[int], float]


def constant_decay(limit: float) -> Decay:
    """The decay of update n = 1, 2, ...: n / (9 + n) up to the limit, so that a short run forgets its start."""
    return lambda n: min(limit, n / (9 + n))


def power_decay(gamma: float) -> Decay:
    """(1 - 1/n)^(gamma + 1): step t weighs as t^gamma at every length of training (Karras et al. 2024, eq. 127)."""
    return lambda n: (1 - 1 / n) ** (gamma + 1)


class Ema:
    """average <- average + (1 - decay(n)) (weight - average) over the parameters that are trained.

    offloaded: it is stored in the CPU's memory, for devices with little memory.
    """

    def __init__(self, module: nn.Module, decay: Decay, *, offloaded: bool = False):
        self._trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._decay, self._offloaded = decay, offloaded
        self.averaged: dict[str, Tensor] = {name: self._placed(p).clone() for name, p in self._trained.items()}

    def _placed(self, weight: Tensor) -> Tensor:
        return weight.detach().cpu() if self._offloaded else weight.detach()

    @torch.no_grad()
    def update(self, n: int) -> None:
        """After optimizer step n, counted from 1."""
        weights = [self._placed(p) for p in self._trained.values()]
        torch._foreach_lerp_(list(self.averaged.values()), weights, 1 - self._decay(n))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """A block in which the module has the averaged weights; afterwards it has its own again, to the bit."""
        own = {name: p.detach().clone() for name, p in self._trained.items()}
        self._put(self.averaged)
        try:
            yield
        finally:
            self._put(own)

    def apply(self) -> None:
        """Copy the averaged weights into the module."""
        self._put(self.averaged)

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self._trained.items():
            parameter.copy_(values[name])
