"""Networks as functions of named tensors that a tracer can follow; see runtime/export.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Traced:
    """A function of a network.

    part: the model's part that holds the weights. network: the module that has them, under the names of its files.
    function: of tensors -> one output or several. inputs: two examples. The first is traced; its sizes all differ, so
    that the tracer confuses none. The second has other sizes, and shows whether one was taken for a constant.
    reference: the network's own computation, where `function` is a form for the tracer.
    """

    part: str
    network: nn.Module
    function: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: Sequence[Inputs]
    reference: Callable[..., Tensor] | None = None


@runtime_checkable
class Traceable(Protocol):
    """A network whose computation can be traced."""

    def traced(self) -> dict[str, Traced]:
        """Its functions, by the names of their graphs."""
        ...

    def facts(self) -> dict[str, Any]:
        """What a program that runs the graphs must know about it, as JSON values."""
        ...


def example(*shape: int) -> Tensor:
    """Normal numbers, the same at every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
