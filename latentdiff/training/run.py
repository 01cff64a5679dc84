"""One run of one stage: the policies around the loop (resume, log, preview, checkpoint, progress)."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from latentdiff.config import Training
from latentdiff.errors import ModelError
from latentdiff.training.checkpoint import Trained, checkpoints, load_checkpoint, save_checkpoint
from latentdiff.training.ema import ema_of
from latentdiff.training.loop import Optimisation, Stage, TrainStep, train_steps
from latentdiff.training.optim import optimizer_of, trapezoid

Report = Callable[[int, nn.Module], dict[str, float]]


def run_stage(
    accelerator: Accelerator,
    stage: Stage,
    settings: Training,
    directory: Path,
    report: Report | None = None,
    made_from: str = "",
) -> nn.Module:
    """Train a stage to its last step, from its newest checkpoint if there is one, and return the averaged module.

    `directory` gets `log.jsonl` and `checkpoints/`. `report(step, averaged module)` is called every
    `validation_steps` and at the end; what it returns is a line of the log. `made_from` names what the stage is
    trained on; a checkpoint of another is refused with ModelError.
    """
    directory.mkdir(parents=True, exist_ok=True)
    optimizer = optimizer_of(stage.module, settings)
    module, optimizer = accelerator.prepare(stage.module, optimizer)
    ema = ema_of(accelerator.unwrap_model(module), settings.ema_decay)
    trained = Trained(accelerator.unwrap_model(module), ema, optimizer)
    start = _resume(directory, trained, made_from)
    optimisation = Optimisation(
        optimizer,
        ema,
        partial(_learning_rate, settings=settings),
        settings.max_grad_norm,
        settings.gradient_accumulation_steps,
    )
    steps = train_steps(accelerator, stage, module, optimisation, start, settings.max_train_steps)
    bar = tqdm(steps, directory.name, settings.max_train_steps, initial=start, unit="step", mininterval=1)
    with (directory / "log.jsonl").open("a", buffering=1) as log:
        began = time.monotonic()
        for step in bar:
            bar.set_postfix(loss=f"{step.loss:.4f}", lr=f"{step.learning_rate:.1e}", refresh=False)
            last = step.number == settings.max_train_steps
            log.write(json.dumps(_record(step, time.monotonic() - began)) + "\n")
            if last or step.number % settings.checkpointing_steps == 0:
                state = {"step": step.number, "made_from": made_from}
                save_checkpoint(directory / "checkpoints", trained, state, settings.checkpoints_total_limit)
            if report and (last or step.number % settings.validation_steps == 0):  # after what it could lose is saved
                log.write(json.dumps({"step": step.number, **report(step.number, ema.module)}) + "\n")
    averaged: nn.Module = ema.module
    return averaged.eval()


def _resume(directory: Path, trained: Trained, made_from: str) -> int:
    """The step to start from. Log lines beyond it are dropped, so that each step is logged once."""
    found = checkpoints(directory / "checkpoints")
    state = load_checkpoint(found[-1], trained) if found else {"step": 0}
    if state.get("made_from", made_from) != made_from:
        raise ModelError(f"{found[-1]} was trained on other networks than are there now. Move {directory} away")
    log = directory / "log.jsonl"
    if log.exists():
        lines = log.read_text().splitlines()
        log.write_text("".join(f"{line}\n" for line in lines if _logged_step(line) <= state["step"]))
    return int(state["step"])


def _logged_step(line: str) -> float:
    """The step of a line of the log; none for one that was cut off in the middle."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _learning_rate(step: int, settings: Training) -> float:
    factor = trapezoid(step, settings.max_train_steps, settings.lr_warmup_steps, settings.lr_decay)
    return settings.learning_rate * factor


def _record(step: TrainStep, seconds: float) -> dict[str, float]:
    return {
        "step": step.number,
        "loss": step.loss,
        "learning_rate": step.learning_rate,
        "grad_norm": step.grad_norm,
        "seconds": round(seconds, 1),
    }
