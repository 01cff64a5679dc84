"""`latentdiff train`: the stages of a config, one after another, into one run folder."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from latentdiff.errors import ResourceError


class StageName(StrEnum):
    """The stages in their order."""

    autoencoder = "autoencoder"
    clip = "clip"
    denoiser = "denoiser"


def train(
    config: Annotated[Path, typer.Argument(help="A TOML file such as configs/scenes-64.toml.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Run folder (default: runs/NAME).")] = None,
    stage: Annotated[list[StageName] | None, typer.Option(help="Run these stages only; may be repeated.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key: denoiser.training.learning_rate=1e-4.")
    ] = None,
) -> None:
    """Train a model from nothing: autoencoder, CLIP, denoiser. Goes on where an earlier start stopped.

    The finished model is the folder RUN/model, which `generate -m` and diffusers load.
    """
    from latentdiff.config import load_config, save_config

    effective = load_config(config, set_ or ())
    run = output or Path("runs") / effective.name

    from latentdiff.build import check_networks
    from latentdiff.stages import STAGES, check_unchanged

    check_networks(effective)
    check_unchanged(effective, run)
    try:
        run.mkdir(parents=True, exist_ok=True)
        save_config(effective, run / "config.toml")
    except OSError as error:
        raise ResourceError(f"cannot write to {run} ({(error.strerror or str(error)).lower()})") from None
    for name, train_stage in STAGES.items():
        if not stage or name in stage:
            train_stage(effective, run)
    typer.echo(run / "model")
