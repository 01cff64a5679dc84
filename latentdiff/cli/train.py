"""`latentdiff train`: the stages of a config, one after another, into one run folder."""

from __future__ import annotations

from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentdiff.cli import terminal
from latentdiff.core.errors import ConfigError
from latentdiff.core.files import check_writable

if TYPE_CHECKING:
    from latentdiff.settings.config import Config


class StageName(StrEnum):
    """The stages, in order."""

    autoencoder = "autoencoder"
    clip = "clip"
    denoiser = "denoiser"


def train(
    config: Annotated[Path, typer.Argument(help="A TOML file such as configs/scenes-64.toml.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Run folder (default: runs/NAME).")] = None,
    stage: Annotated[list[StageName] | None, typer.Option(help="Run only this stage; may be repeated.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key: denoiser.training.learning_rate=1e-4.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="Train on these pictures: a folder, .tar shards, .parquet, a hub id.")
    ] = None,
    skip_bad: Annotated[
        bool,
        typer.Option("--skip-bad", help="Leave out unusable pictures and list them in RUN/quarantine.jsonl."),
    ] = False,
    allow_missing_captions: Annotated[
        bool, typer.Option("--allow-missing-captions", help="Train pictures without a caption on the empty one.")
    ] = False,
    resume: Annotated[
        str,
        typer.Option(
            "--resume",
            "--resume-from-checkpoint",
            help="auto: from the newest checkpoint, or fresh without one; latest: there must be one; or its path.",
        ),
    ] = "auto",
    allow_changed: Annotated[
        bool, typer.Option("--allow-changed", help="Resume with settings that differ from the checkpoint's.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Bitwise reproducible on a GPU too, with slower kernels.")
    ] = False,
) -> None:
    """Train a model from nothing: autoencoder, CLIP, denoiser. After an interruption run the same command to resume.

    The finished model is the folder RUN/model, which `generate -m` and diffusers load. With `accelerate launch` several
    processes share the batches.
    """
    from latentdiff.settings.config import load_config, own_pictures

    more = [] if data is None else own_pictures(data)
    if skip_bad:
        more.append(("data.pictures.skip_bad", True))
    if allow_missing_captions:
        more.append(("data.pictures.allow_missing_captions", True))
    effective = load_config(config, [*(set_ or ()), *more])
    folder = output or Path("runs") / effective.name
    check_writable(folder, folder)
    if (folder / "finetune.toml").exists():
        raise ConfigError(f"{folder} holds another run, of `latentdiff finetune`. Choose another folder")
    if stage and StageName.clip in stage and not effective.reads_texts:
        raise ConfigError("this config has no CLIP: its network reads classes")
    initial = effective.denoiser.initial
    if initial and stage and set(stage) != {StageName.denoiser}:
        raise ConfigError(f"denoiser.initial: {initial} has an autoencoder and CLIP. Only the denoiser is trained")
    every = [StageName.denoiser] if initial else list(StageName)
    stages = [str(name) for name in stage or every if name != StageName.clip or effective.reads_texts]
    _train(effective, folder, stages, resume, allow_changed, dry_run, deterministic)


def _train(
    config: Config,
    folder: Path,
    stages: list[str],
    resume: str,
    allow_changed: bool,
    dry_run: bool,
    deterministic: bool,
) -> None:
    from latentdiff.data.dataset import open_data
    from latentdiff.families.own import check_networks
    from latentdiff.runtime.memory import keep_freed_memory
    from latentdiff.settings.config import save_config
    from latentdiff.stages.chain import TRAIN
    from latentdiff.stages.denoiser import with_before
    from latentdiff.stages.initial import place_networks
    from latentdiff.stages.plan import plan_of
    from latentdiff.stages.run import check_trainable, new_accelerator, prepared
    from latentdiff.training.interruption import Interruption
    from latentdiff.training.lock import locked
    from latentdiff.training.optim import check_optimizer

    check_networks(config)
    for each in StageName:
        check_optimizer(getattr(config, each.value).training)
    keep_freed_memory()
    with Interruption() as interruption:
        accelerator = new_accelerator(config)
        if deterministic:
            _choose_deterministic_kernels()
        with accelerator.main_process_first():
            cache = None if dry_run else folder / "cache"
            data = with_before(config, open_data(config, cache), cache)
        check_trainable(config, data, stages, accelerator.num_processes)
        chosen = [name for name in TRAIN if name in stages]
        run, notes = prepared(
            config, folder, accelerator, data, chosen, interruption, resume=resume, allow_changed=allow_changed
        )
        if accelerator.is_main_process:
            terminal.note(*notes, *plan_of(run))
        if dry_run:
            return
        with locked(folder) if accelerator.is_main_process else nullcontext():
            if accelerator.is_main_process:
                if config.denoiser.initial:
                    place_networks(config.denoiser.initial, folder)
                save_config(config, folder / "config.toml")
                data.write_quarantine(folder)
            accelerator.wait_for_everyone()
            for name in run.stages:
                TRAIN[name](run)
    if accelerator.is_main_process:
        terminal.result(folder / "model")


def _choose_deterministic_kernels() -> None:
    import os

    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires it before its first use
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
