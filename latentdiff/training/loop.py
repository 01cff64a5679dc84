"""The training loop: a generator that makes one optimizer step and yields it.

Progress bars, logs, previews, checkpoints and stopping are the `for` body of whoever iterates. A batch is a
function of its number alone, so the loop has no data position of its own to save.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from latentdiff.errors import NonFiniteError


class Stage(Protocol):
    """What is trained: a module, its batches and its loss."""

    @property
    def module(self) -> nn.Module:
        """What is trained, before it is prepared for the device."""
        ...

    def batch(self, index: int) -> Any:
        """The micro-batch with this number, counted from the start of the run: a function of it alone."""
        ...

    def loss(self, module: nn.Module, batch: Any) -> Tensor:
        """The scalar to be minimised; `module` is the stage's own, as prepared for the device."""
        ...


@dataclass(frozen=True)
class TrainStep:
    """One step made: its number (from 1), mean loss, learning rate and gradient norm before clipping."""

    number: int
    loss: float
    learning_rate: float
    grad_norm: float


@dataclass(frozen=True)
class Optimisation:
    """Everything the loop changes, and the rates it changes it by."""

    optimizer: torch.optim.Optimizer
    ema: AveragedModel
    learning_rate: Callable[[int], float]
    max_grad_norm: float
    accumulation_steps: int


def train_steps(
    accelerator: Accelerator, stage: Stage, module: nn.Module, optimisation: Optimisation, start: int, stop: int
) -> Iterator[TrainStep]:
    """Make the steps start + 1 .. stop, yielding each after the weights and their average have moved."""
    optimizer = optimisation.optimizer
    for step in range(start, stop):
        rate = optimisation.learning_rate(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        module.train()
        total = 0.0
        micro_batches = optimisation.accumulation_steps
        for micro in range(micro_batches):
            with accelerator.autocast():
                loss = stage.loss(module, stage.batch(step * micro_batches + micro)) / micro_batches
            accelerator.backward(loss)
            total += float(loss.detach())
        norm = float(accelerator.clip_grad_norm_(module.parameters(), optimisation.max_grad_norm))
        if not (torch.isfinite(torch.tensor([total, norm])).all()):
            raise NonFiniteError(
                f"loss or gradient is not finite at step {step + 1} (loss {total}, gradient norm {norm})"
            )
        optimizer.step()
        optimizer.zero_grad()
        optimisation.ema.update_parameters(accelerator.unwrap_model(module))
        yield TrainStep(step + 1, total, rate, norm)
