"""One run of one stage: the policies around the loop (resume, log, preview, checkpoint, progress, signals)."""

from __future__ import annotations

import resource
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import closing, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from tqdm.auto import tqdm

from latentdiff.core.errors import Interrupted, ModelError, NonFiniteError
from latentdiff.core.files import write_json
from latentdiff.settings.config import Training
from latentdiff.training.checkpoint import checkpoints, damage, load_checkpoint, load_state, save_checkpoint, set_aside
from latentdiff.training.ema import Ema, constant_decay, power_decay
from latentdiff.training.interruption import Interruption
from latentdiff.training.log import LOG, Log
from latentdiff.training.loop import Batching, Optimisation, Stage, TrainStep, train_steps
from latentdiff.training.optim import learning_rate, optimizer_of
from latentdiff.training.state import Trained, gather, restore, size, unshard

Report = Callable[[int], dict[str, float]]


@dataclass(frozen=True)
class Origin:
    """The origin of a run: its checkpoint, if any, and the identity that its checkpoints record."""

    checkpoint: Path | None = None
    identity: dict[str, Any] | None = None


@dataclass(frozen=True)
class Progress:
    """The progress of a run: steps, samples, and the samples that go through the network at once."""

    step: int = 0
    position: int = 0
    micro_batch: int | None = None


def run_stage(
    accelerator: Accelerator,
    stage: Stage,
    settings: Training,
    directory: Path,
    report: Report | None = None,
    start: Origin | None = None,
    interruption: Interruption | None = None,
    *,
    from_the_start: bool = False,
) -> None:
    """Train `stage.module` to its last step and leave the averaged weights in it.

    `directory` gets `log.jsonl`, `tensorboard/` and `checkpoints/`. `report(step)` is called every `validation_steps`
    and at the end, and before the first step if `from_the_start`, with the averaged weights in the module; its result
    is a line of the log. On a signal the current step is finished and saved, then Interrupted is raised.
    """
    start, interruption = start or Origin(), interruption or Interruption()
    run = _Run(accelerator, stage, settings, directory, report, start, interruption, from_the_start)
    progress = run.resume(start.checkpoint)
    accelerator.wait_for_everyone()
    try:
        with interruption.deferred():
            run.train(progress)
    except NonFiniteError as error:
        if accelerator.is_main_process:
            write_json(directory / "non-finite.json", {"message": str(error), "samples": error.samples})
        raise
    run.trained.ema.apply()
    unshard(stage.module)
    stage.module.eval()
    accelerator.free_memory()


class _Run:
    """A stage prepared for its device, and the policies around its steps."""

    def __init__(
        self,
        accelerator: Accelerator,
        stage: Stage,
        settings: Training,
        directory: Path,
        report: Report | None,
        start: Origin,
        interruption: Interruption,
        from_the_start: bool,
    ):
        self._accelerator, self._stage, self._settings = accelerator, stage, settings
        self._directory, self._report, self._reported = directory, report, from_the_start
        self._identity = start.identity or {}
        if report and accelerator.distributed_type == DistributedType.FSDP:  # no process has the whole network
            self._report = None
            if accelerator.is_main_process:
                _say("warning: no validation and no previews while the network is sharded")
        self._interruption = interruption
        self._batching = Batching(
            settings.train_batch_size, settings.gradient_accumulation_steps, accelerator.num_processes
        )
        self._module, self._optimizer = accelerator.prepare(stage.module, optimizer_of(stage.module, settings))
        if settings.compile:  # validations use the same weights, but not the compiled shapes
            self._module = torch.compile(self._module)
        decay = constant_decay(settings.ema_decay) if settings.ema == "constant" else power_decay(settings.ema_power)
        self.trained = Trained(stage.parts, Ema(stage.module, decay, offloaded=settings.ema_offload), self._optimizer)

    def resume(self, checkpoint: Path | None) -> Progress:
        """Restore a checkpoint. Newer whole ones are moved aside, since the run will write its own."""
        if checkpoint is None:
            return Progress()
        tensors, state = load_checkpoint(checkpoint)
        if state.get("made_from") != self._identity.get("made_from"):
            raise ModelError(f"{checkpoint} belongs to other networks than the run's. Move {self._directory} away")
        restore(self.trained, tensors)
        if self._accelerator.is_main_process:
            log = self._directory / LOG
            for other in checkpoints(self._directory / "checkpoints"):
                another = other.resolve() != checkpoint.resolve() and not damage(other)
                if another and load_state(other)["step"] >= state["step"]:
                    aside = set_aside(other)
                    if log.exists():
                        shutil.copy(log, aside)  # the run's log goes back to this step
            if (before := state["batching"]) != (now := asdict(self._batching)):
                _say(
                    f"warning: batches are split as {now}, before as {before}: the same samples, sums rounded otherwise"
                )
        halved = self._stage.divisible and state["micro_batch"] < state["batching"]["batch_size"]  # memory ran out
        return Progress(state["step"], state["position"], state["micro_batch"] if halved else None)

    def train(self, progress: Progress) -> None:
        """Make every remaining step, and what is due after it."""
        settings, main = self._settings, self._accelerator.is_main_process
        steps = train_steps(
            self._accelerator,
            self._stage,
            self._module,
            Optimisation(
                self._optimizer, self.trained.ema, partial(learning_rate, settings=settings), settings.max_grad_norm
            ),
            self._batching,
            range(progress.step, max(settings.max_train_steps, progress.step)),
            position=progress.position,
            micro_batch=progress.micro_batch,
            workers=settings.num_workers,
        )
        name, last = self._directory.name, settings.max_train_steps
        bar = tqdm(steps, name, last, initial=progress.step, unit="step", mininterval=1, disable=not main)
        with closing(steps), bar, Log(self._directory, progress.step) if main else nullcontext() as log:
            lacking = [bool(log and (progress.step or self._reported) and progress.step not in log.reported)]
            if broadcast_object_list(lacking)[0]:  # a kill between the checkpoint and its report
                self._report_if_due(progress.step, log)
            began, micro_batch = time.monotonic(), progress.micro_batch or settings.train_batch_size
            for step in bar:
                if step.micro_batch != micro_batch:
                    _say(f"micro-batch {micro_batch} -> {step.micro_batch} after out of memory")
                    micro_batch = step.micro_batch
                self._show(bar, step)
                if log:
                    log.write(step.number, _record(step, time.monotonic() - began), "train")
                self._after(step, log)

    def _after(self, step: TrainStep, log: Log | None) -> None:
        """Checkpoint, report or stop after a step. The checkpoint comes first, since a report may fail."""
        due = step.number == self._settings.max_train_steps or step.number % self._settings.checkpointing_steps == 0
        if due:
            self._save(step)
        self._report_if_due(step.number, log)
        if number := self._interrupted():
            if not due:
                self._save(step)
            raise Interrupted(number, f"step-{step.number}")

    def _save(self, step: TrainStep) -> None:
        parts = gather(self.trained)
        if self._accelerator.is_main_process:
            state = {
                "step": step.number,
                "position": step.position,
                "micro_batch": step.micro_batch,
                "learning_rate": step.learning_rate,
                "batching": asdict(self._batching),
                **self._identity,
            }
            keep = self._settings.checkpoints_total_limit
            save_checkpoint(self._directory / "checkpoints", parts, size(self.trained), state, keep)
        for _ in parts:  # all ranks contribute to what the first one writes
            pass
        self._accelerator.wait_for_everyone()

    def _report_if_due(self, step: int, log: Log | None) -> None:
        """A report by one process for all. A signal ends it at once; the next start repeats it."""
        due = step == self._settings.max_train_steps or step % self._settings.validation_steps == 0
        if not (due and self._report):
            return
        with self.trained.ema.applied(), suppress(Interrupted), self._interruption.deferred(False):
            if log:
                log.write(step, self._report(step), "validation")
        self._accelerator.wait_for_everyone()

    def _interrupted(self) -> int:
        """The signal that any of the processes received, or 0."""
        received = self._interruption.received or 0
        if self._accelerator.num_processes == 1:
            return received
        return int(self._accelerator.gather(torch.tensor([received], device=self._accelerator.device)).max())

    def _show(self, bar: tqdm[TrainStep], step: TrainStep) -> None:
        """Show loss, rate, samples a second and peak memory beside the progress bar."""
        speed = (bar.format_dict["rate"] or 0) * self._batching.global_batch
        bar.set_postfix_str(
            f"loss {step.loss:.4f}, lr {step.learning_rate:.1e}, {speed:.0f} images/s, {peak_memory() / 1e9:.1f} GB",
            refresh=False,
        )


def peak_memory() -> float:
    """The peak memory so far in bytes, on the GPU if there is one."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    unit = 1.0 if sys.platform == "darwin" else 1024.0
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _say(message: str) -> None:
    tqdm.write(message, file=sys.stderr)


def _record(step: TrainStep, seconds: float) -> dict[str, float]:
    return {
        "loss": step.loss,
        "learning_rate": step.learning_rate,
        "grad_norm": step.grad_norm,
        "seconds": round(seconds, 1),
    }
