"""`latentdiff runs`: the runs of a folder, the progress of their stages, and whether they are running."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from latentdiff.cli import terminal


def runs(
    folder: Annotated[Path, typer.Argument(help="The folder of the run folders.")] = Path("runs"),
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """List training runs with their state: running, finished, stopped, or stopped by non-finite numbers."""
    import json

    from latentdiff.core.errors import ConfigError

    if not folder.is_dir():
        raise ConfigError(f"no such folder ({folder}). Give the one that holds the run folders")
    states = [_run(path) for path in sorted([*folder.glob("*/config.toml"), *folder.glob("*/finetune.toml")])]
    for run in states:
        if json_:
            terminal.result(json.dumps(run))
        else:
            stages = "  ".join(f"{name} {step}/{last}" for name, (step, last) in run["stages"].items())
            loss = "" if run["loss"] is None else f"  loss {run['loss']:.4f}"
            terminal.result(f"{run['name']:<20} {run['state']:<10} {run['last'] or 'never':<19}  {stages}{loss}")
    if not states:
        terminal.note(f"no runs in {folder}")


def _lengths(path: Path) -> dict[str, int]:
    """The stages of a run's config with their last steps. Raises ConfigError."""
    from latentdiff.settings.config import STAGES, load_config
    from latentdiff.settings.finetuning import FILE, STAGE, load_finetuning

    if path.name == FILE:
        return {STAGE: load_finetuning(path).finetune.training.max_train_steps}
    config = load_config(path)
    names = [name for name in STAGES if name != "autoencoder" or config.autoencoder.kind != "identity"]
    return {name: getattr(config, name).training.max_train_steps for name in names}


def _run(path: Path) -> dict[str, Any]:
    """The state of a run folder; an unreadable config becomes its state."""
    from datetime import datetime

    from latentdiff.core.errors import ConfigError
    from latentdiff.training.lock import is_locked

    folder = path.parent
    try:
        lengths = _lengths(path)
    except ConfigError as error:
        return {"name": folder.name, "state": "unreadable", "stages": {}, "loss": None, "last": None, "why": str(error)}
    names = list(lengths)
    lines = {name: _last_step(folder / name / "log.jsonl") for name in names}
    stages = {name: (lines[name].get("step", 0), lengths[name]) for name in names}
    logs = [folder / name / "log.jsonl" for name in names if (folder / name / "log.jsonl").is_file()]
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


def _last_step(log: Path) -> dict[str, Any]:
    """The last complete line of a log that has a step; empty if there is none."""
    import json
    import math

    for line in reversed(log.read_text(errors="replace").splitlines() if log.is_file() else []):
        try:
            read = json.loads(line)
            if type(read["step"]) is int and math.isfinite(read["loss"]):
                return read
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
            continue
    return {}
