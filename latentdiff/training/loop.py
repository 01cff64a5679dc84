"""The training loop: a generator that makes one optimizer step and yields it.

Progress bars, logs, previews, checkpoints and stopping are in the caller's `for` body. Samples are one endless
sequence, epoch after epoch. A step takes the next `global_batch` positions, so the numbers of processes, micro-batches
and workers do not change its samples.
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

from latentdiff.core.errors import NonFiniteError, ResourceError, is_out_of_memory
from latentdiff.training.ema import Ema
from latentdiff.training.loader import Batch, batches_of


class Stage(Protocol):
    """A stage of training: a module, its batches and its loss."""

    divisible: bool
    """Whether the loss of a batch is the mean over its samples, so that the batch can be split."""

    @property
    def module(self) -> nn.Module:
        """The module, before it is prepared for the device."""
        ...

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The parts of the module in a checkpoint, by file name."""
        ...

    def batch(self, positions: range) -> Batch:
        """Tensors (B, ...) by name, on the CPU; each row depends only on its position."""
        ...

    def loss(self, module: nn.Module, batch: Any) -> Tensor:
        """Losses (B,), or their mean; module: the stage's module, prepared for the device."""
        ...

    def sample_ids(self, positions: range) -> list[str]:
        """The names of the samples at these positions."""
        ...


@dataclass(frozen=True)
class TrainStep:
    """A finished step: its number (from 1), samples so far, mean loss, learning rate, gradient norm before clipping,
    and the number of samples that went through the network at once.
    """

    number: int
    position: int
    loss: float
    learning_rate: float
    grad_norm: float
    micro_batch: int


@dataclass(frozen=True)
class Optimisation:
    """The state that the loop changes: optimizer and average, and their rates."""

    optimizer: torch.optim.Optimizer
    ema: Ema
    learning_rate: Callable[[int], float]
    max_grad_norm: float


@dataclass(frozen=True)
class Batching:
    """The samples of a micro-batch, the micro-batches of a process in a step, and the number of processes."""

    batch_size: int
    accumulation_steps: int = 1
    processes: int = 1

    @property
    def global_batch(self) -> int:
        """The number of samples of a step."""
        return self.batch_size * self.accumulation_steps * self.processes

    def shares(self, position: int, process: int) -> list[range]:
        """The positions of one process in the step that begins at `position`, one range a batch."""
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
    """Make the steps after steps.start up to steps.stop, yielding each after the weights and their average changed.

    position: the first sample. micro_batch: the most samples that go through the network at once; it is halved when
    memory runs out, and the step is repeated. Raises NonFiniteError for a loss or gradient that is not finite, before
    the weights change, and ResourceError if memory runs out for a single sample.
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
            loss, grad_norm = _mean_loss(accelerator, losses, norm)
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                raise _not_finite(stage, losses, batching.shares(first, process), step + 1, loss)
            optimizer.step()
            optimizer.zero_grad()
            optimisation.ema.update(step + 1)
            seen = first + batching.global_batch
            yield TrainStep(step + 1, seen, loss, optimisation.learning_rate(step), grad_norm, micro_batch)


def _backward(
    accelerator: Accelerator, stage: Stage, module: nn.Module, batches: Sequence[Batch], micro_batch: int
) -> list[Tensor] | None:
    """Compute gradients of the mean loss, `micro_batch` samples at a time; the losses, or None if memory ran out."""
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
        if not is_out_of_memory(error):
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
    """Half the micro-batch. Raises ResourceError for several processes, which would wait for each other for ever."""
    if micro_batch == 1 or not stage.divisible or accelerator.num_processes > 1:
        raise ResourceError(
            f"out of memory at step {step} with micro-batch {micro_batch}. Use a smaller model or batch"
        )
    return micro_batch // 2


def _mean_loss(accelerator: Accelerator, losses: list[Tensor], norm: Tensor) -> list[float]:
    """The mean loss over all processes, and the gradient norm. Only here does a step wait for the device.

    It must, since weights must not change by numbers that are not finite; only a few kernels follow.
    """
    mean = accelerator.reduce(torch.cat(losses).float().mean(), "mean")
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    numbers: list[float] = torch.stack([mean, norm.to(mean)]).tolist()
    return numbers


def _not_finite(stage: Stage, losses: list[Tensor], shares: list[range], step: int, loss: float) -> NonFiniteError:
    """An error that names the samples whose loss is not finite, or all samples if only the gradient is not."""
    ids = [name for share in shares for name in stage.sample_ids(share)]
    finite = torch.cat(losses).isfinite().cpu()
    bad = [name for name, good in zip(ids, finite, strict=True) if not good] if len(finite) == len(ids) else ids
    named: list[str] = gather_object(bad) or gather_object(ids)
    what = "gradient" if math.isfinite(loss) else "loss"
    names = ", ".join(named[:5]) + (f", ... {len(named)} in all" if len(named) > 5 else "")
    return NonFiniteError(f"{what} is not finite at step {step} (samples {names}). The weights were not changed", named)
