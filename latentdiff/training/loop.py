"""The training loop: a generator that makes one optimizer step and yields it.

Progress bars, logs, previews, checkpoints and stopping are the `for` body of whoever iterates. Samples stand in one
endless sequence, epoch after epoch; a step takes the next `global_batch` positions of it, whoever computes them, so
neither the number of processes nor of micro-batches nor of workers changes what is learnt from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from latentdiff.core.errors import NonFiniteError, ResourceError
from latentdiff.training.ema import Ema
from latentdiff.training.loader import Batch, batches_of


class Stage(Protocol):
    """What is trained: a module, its batches and its loss."""

    divisible: bool
    """Whether the loss of a batch is the mean over its samples, so that it can be computed in parts."""

    @property
    def module(self) -> nn.Module:
        """What is trained, before it is prepared for the device."""
        ...

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The parts of the module that a checkpoint holds, by the name of their file."""
        ...

    def batch(self, positions: range) -> Batch:
        """Tensors (B, ...) by name, on the CPU: a function of the positions alone, each row of its own."""
        ...

    def loss(self, module: nn.Module, batch: Any) -> Tensor:
        """Losses (B,), or their mean, to be minimised; `module` is the stage's own, as prepared for the device."""
        ...

    def sample_ids(self, positions: range) -> list[str]:
        """What the samples at these positions are called."""
        ...


@dataclass(frozen=True)
class TrainStep:
    """One step made: its number (from 1), the samples seen by then, mean loss, learning rate, gradient norm before
    clipping, and how many samples went through the network at once.
    """

    number: int
    position: int
    loss: float
    learning_rate: float
    grad_norm: float
    micro_batch: int


@dataclass(frozen=True)
class Optimisation:
    """Everything the loop changes, and the rates it changes it by."""

    optimizer: torch.optim.Optimizer
    ema: Ema
    learning_rate: Callable[[int], float]
    max_grad_norm: float


@dataclass(frozen=True)
class Batching:
    """Samples a process takes at a time, how many times a step, and how many processes."""

    batch_size: int
    accumulation_steps: int = 1
    processes: int = 1

    @property
    def global_batch(self) -> int:
        """Samples a step."""
        return self.batch_size * self.accumulation_steps * self.processes

    def shares(self, position: int, process: int) -> list[range]:
        """The positions one process takes of the step that begins at `position`, one range a batch."""
        firsts = [
            position + (number * self.processes + process) * self.batch_size
            for number in range(self.accumulation_steps)
        ]
        return [range(first, first + self.batch_size) for first in firsts]


def train_steps(
    accelerator: Accelerator,
    stage: Stage,
    module: nn.Module,
    optimisation: Optimisation,
    batching: Batching,
    steps: range,
    *,
    position: int = 0,
    micro_batch: int | None = None,
    workers: int = 0,
) -> Generator[TrainStep]:
    """Make the steps after steps.start up to steps.stop, yielding each after the weights and their average moved.

    The first begins at `position` of the samples. `micro_batch` samples at most go through the network at once; it is
    halved where memory ends, and the same samples are taken again. Raises NonFiniteError for a loss or gradient that
    is not finite, before the weights move, and ResourceError where memory ends and nothing is left to halve.
    """
    optimizer, process = optimisation.optimizer, accelerator.process_index
    micro_batch = micro_batch or batching.batch_size
    firsts = range(position, position + len(steps) * batching.global_batch, batching.global_batch)
    shares = (share for first in firsts for share in batching.shares(first, process))
    with closing(batches_of(stage.batch, shares, workers, accelerator.device)) as batches:
        for step, first in zip(steps, firsts, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = optimisation.learning_rate(step)
            module.train()
            step_batches = [
                send_to_device(next(batches), accelerator.device) for _ in range(batching.accumulation_steps)
            ]
            losses = None
            while losses is None:
                losses = _backward(accelerator, stage, module, step_batches, micro_batch)
                if losses is None:
                    optimizer.zero_grad()
                    micro_batch = _halved(micro_batch, accelerator, stage, step + 1)
            norm = accelerator.clip_grad_norm_(module.parameters(), optimisation.max_grad_norm)
            loss, grad_norm = _told(accelerator, losses, norm)
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                raise _not_finite(accelerator, stage, losses, batching.shares(first, process), step + 1, loss)
            optimizer.step()
            optimizer.zero_grad()
            optimisation.ema.update(step + 1)
            seen = first + batching.global_batch
            yield TrainStep(step + 1, seen, loss, optimisation.learning_rate(step), grad_norm, micro_batch)


def _backward(
    accelerator: Accelerator, stage: Stage, module: nn.Module, batches: Sequence[Batch], micro_batch: int
) -> list[Tensor] | None:
    """Gradients of the mean loss, taken `micro_batch` samples at a time; the losses, or None where memory ended."""
    parts = [part for batch in batches for part in _split(batch, micro_batch)]
    samples = sum(map(_size, batches))
    losses = []
    try:
        for number, part in enumerate(parts, 1):
            with nullcontext() if number == len(parts) else accelerator.no_sync(module):
                with accelerator.autocast():
                    loss = stage.loss(module, part)
                accelerator.backward(loss.mean() * (_size(part) / samples))
            losses.append(loss.detach().reshape(-1))
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        return None
    return losses


def _size(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _split(batch: Batch, size: int) -> list[Batch]:
    return [
        {name: tensor[first : first + size] for name, tensor in batch.items()} for first in range(0, _size(batch), size)
    ]


def _halved(micro_batch: int, accelerator: Accelerator, stage: Stage, step: int) -> int:
    """Half of it. Processes would wait for each other's gradients for ever, so several do not try again."""
    if micro_batch == 1 or not stage.divisible or accelerator.num_processes > 1:
        raise ResourceError(
            f"out of memory at step {step} with micro-batch {micro_batch}. Use a smaller model or batch"
        )
    return micro_batch // 2


def _told(accelerator: Accelerator, losses: list[Tensor], norm: Tensor) -> list[float]:
    """Mean loss over all processes, and gradient norm: the one time a step waits for the device.

    It must, for the weights may not move on numbers that are not finite; what follows is a handful of kernels.
    """
    mean = accelerator.reduce(torch.cat(losses).float().mean(), "mean")
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    numbers: list[float] = torch.stack([mean, norm.to(mean)]).tolist()
    return numbers


def _not_finite(
    accelerator: Accelerator, stage: Stage, losses: list[Tensor], shares: list[range], step: int, loss: float
) -> NonFiniteError:
    """Names the samples whose own loss is not finite, or all of the step where only their gradient is."""
    ids = [name for share in shares for name in stage.sample_ids(share)]
    finite = torch.cat(losses).isfinite().cpu()
    bad = [name for name, good in zip(ids, finite, strict=True) if not good] if len(finite) == len(ids) else ids
    named: list[str] = gather_object(bad) or gather_object(ids)
    what = "gradient" if math.isfinite(loss) else "loss"
    shown = ", ".join(named[:5]) + (f", ... {len(named)} in all" if len(named) > 5 else "")
    return NonFiniteError(f"{what} is not finite at step {step} (samples {shown}). The weights were not changed", named)
