"""`latentdiff runs`: the runs of a folder, the progress of their stages, and whether they are running."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentdiff.cli import terminal


def runs(
    folder: Annotated[Path, typer.Argument(help="The folder of the run folders.")] = Path("runs"),
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """List training runs with their state: running, finished, stopped, or stopped by non-finite numbers."""
    import json

    from latentdiff.core.errors import ConfigError
    from latentdiff.stages.overview import run_folders, state_of

    if not folder.is_dir():
        raise ConfigError(f"no such folder ({folder}). Give the one that holds the run folders")
    states = [state_of(path) for path in run_folders(folder)]
    for run in states:
        if json_:
            terminal.result(json.dumps(run))
        else:
            stages = "  ".join(f"{name} {step}/{last}" for name, (step, last) in run["stages"].items())
            loss = "" if run["loss"] is None else f"  loss {run['loss']:.4f}"
            terminal.result(f"{run['name']:<20} {run['state']:<10} {run['last'] or 'never':<19}  {stages}{loss}")
    if not states:
        terminal.note(f"no runs in {folder}")
