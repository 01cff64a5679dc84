"""The runs in a folder, as others see them: states, curves, and pictures of validations."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path
from typing import Any

from latentdiff.core.errors import ConfigError
from latentdiff.settings.config import load_config
from latentdiff.settings.finetuning import FILE, STAGE, load_finetuning
from latentdiff.training.lock import is_locked
from latentdiff.training.log import LOG, read_log

POINTS = 400  # of a curve that is shown
LARGEST = 1e300  # of a number that is shown
_SAMPLES = re.compile(r"step-\d{1,12}\.png")


def run_folders(folder: Path) -> list[Path]:
    """The run folders in a folder."""
    return [path.parent for path in sorted([*folder.glob("*/config.toml"), *folder.glob(f"*/{FILE}")])]


def state_of(folder: Path) -> dict[str, Any]:
    """The state of a run folder; an unreadable config becomes its state."""
    try:
        lengths = _lengths(folder)
    except ConfigError as error:
        return {"name": folder.name, "state": "unreadable", "stages": {}, "loss": None, "last": None, "why": str(error)}
    lines = {name: _last_step(folder / name / LOG) for name in lengths}
    stages = {name: (lines[name].get("step", 0), lengths[name]) for name in lengths}
    logs = [folder / name / LOG for name in lengths if (folder / name / LOG).is_file()]
    times = [log.stat().st_mtime for log in logs]
    losses = [line["loss"] for line in lines.values() if line]
    state = "finished" if all(step >= last for step, last in stages.values()) else "stopped"
    reports = [report.stat().st_mtime for report in folder.glob("*/non-finite.json")]
    if state == "stopped" and reports and max(reports) >= max(times, default=0):  # and not resumed since
        state = "non-finite"
    return {
        "name": folder.name,
        "state": "running" if is_locked(folder) else state,
        "stages": stages,
        "loss": losses[-1] if losses else None,
        "last": datetime.fromtimestamp(max(times)).isoformat(" ", "seconds") if times else None,
    }


def curves_of(stage: Path) -> dict[str, list[tuple[float, float]]]:
    """The numbers of a stage's log over its steps; a long curve has the means of `POINTS` parts."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for line in read_log(stage / LOG):
        for name, number in line.items():
            if name != "step" and _is_finite(number):
                curves.setdefault(name, []).append((line["step"], number))
    return {name: _thinned(curve) for name, curve in curves.items()}


def samples_of(stage: Path) -> list[str]:
    """The names of the pictures of a stage's validations, in their order."""
    return sorted(path.name for path in stage.glob("samples/step-*.png") if is_sample(path))


def is_sample(path: Path) -> bool:
    """Whether a file is a validation's pictures."""
    return _SAMPLES.fullmatch(path.name) is not None and not path.is_symlink()


def _lengths(folder: Path) -> dict[str, int]:
    """The stages of a run's config with their last steps. Raises ConfigError."""
    if (folder / FILE).is_file():
        return {STAGE: load_finetuning(folder / FILE).finetune.training.max_train_steps}
    config = load_config(folder / "config.toml")
    return {name: getattr(config, name).training.max_train_steps for name in config.stages}


def _last_step(log: Path) -> dict[str, Any]:
    """The last line with a finite loss; empty if there is none."""
    return next((line for line in reversed(read_log(log)) if _is_finite(line.get("loss"))), {})


def _is_finite(number: Any) -> bool:
    """Whether a log's value is a number that can be shown; whole numbers of JSON have any length."""
    return isinstance(number, int | float) and abs(number) < LARGEST


def _thinned(curve: list[tuple[float, float]]) -> list[tuple[float, float]]:
    parts = [curve[len(curve) * k // POINTS : len(curve) * (k + 1) // POINTS] for k in range(POINTS)]
    kept = parts if len(curve) > POINTS else [[point] for point in curve]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in kept]
