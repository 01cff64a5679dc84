"""A run's folder, the state of one start, and the check that an interrupted run may go on with a config."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Generic, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from latentdiff.core.errors import ConfigError, ModelError
from latentdiff.data.dataset import DataSet
from latentdiff.settings.config import STAGES, AnySettings, Config, Settings, flat
from latentdiff.training.checkpoint import check_whole, load_state, newest_whole
from latentdiff.training.interruption import Interruption
from latentdiff.training.log import last_rate
from latentdiff.training.optim import learning_rate
from latentdiff.training.run import Origin

FREE = (
    "max_train_steps",
    "lr_decay",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "validation_steps",
    "preview_pictures",
    "distance_pictures",
    "num_workers",
    "compile",
    "gradient_checkpointing",
    "ema_offload",
    "kohya",  # a rerun writes the same files
    "train_batch_size",  # only their product with the number of processes must stay
    "gradient_accumulation_steps",
    "cache",  # the same numbers, faster
)
SHAPES = {  # settings of networks that their weights' shapes depend on
    "block_out_channels",
    "attention",
    "layers_per_block",
    "latent_channels",
    "inpainting",
    "merges",
    "pooled_text",
    "network",
    "layers",
    "heads",
    "head_width",
    "embed_dim",
    "text_width",
    "text_layers",
    "max_length",
    "patch_size",
    "vision_width",
    "vision_layers",
    "grey",
    "rank",
    "dora",
    "convolutions",
    "vectors",
}
WITHOUT_LAYER = {  # settings -> the values with which a network lacks a layer, or inputs, that it has with all others
    "denoiser.enlarging.scale": (1,),
    "denoiser.editing.source": ("",),
    "consistency.objective": ("lcm", "ect"),
    "consistency.guidance_range": (None,),
}
IDENTIFIED_BY_CONTENT = (  # the identities of the pictures show their effect
    "source",
    "layout",
    "split",
    "image_column",
    "caption_column",
    "streaming",
    "instance_prompt",
    "allow_missing_captions",
    "skip_bad",
    "max_pixels",
    "validation_pictures",
)


WITHOUT_EFFECT = {  # names and drawing settings; the hash of its weights identifies a model
    "name",
    "recommended",
    "previews",
    "model",
    "variant",
    "revision",
}


@dataclass(frozen=True)
class Run(Generic[AnySettings]):
    """One start of a run: its config and folder, the checkpoints to resume from, device and signals."""

    config: AnySettings
    folder: Path
    accelerator: Accelerator
    data: DataSet
    checkpoints: Mapping[str, Path | None]
    interruption: Interruption = field(default_factory=Interruption)

    @property
    def cache(self) -> Path:
        """The folder of cached results."""
        return self.folder / "cache"

    @property
    def stages(self) -> list[str]:
        """The stages that this start trains, in order."""
        return list(self.checkpoints)

    def start(self, stage: str, **more: str) -> Origin:
        """The origin of a stage: its checkpoint, and the identity that its checkpoints record."""
        return Origin(self.checkpoints[stage], {**identity(self.config, stage, self.data), **more})


def new_accelerator(config: Settings) -> Accelerator:
    """The devices and processes of this start. Without a GPU the processes communicate by gloo.

    Processes wait for the one that validates or encodes, longer than torch's default of some minutes.
    """
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=12))
    return Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=config.mixed_precision,
        kwargs_handlers=[patience],
    )


def identity(config: Settings, stage: str, data: DataSet) -> dict[str, Any]:
    """What must not change for a stage to go on: the data set, and every setting that changes the result."""
    settings = {key: value for key, value in flat(config).items() if _matters(key, stage)}
    return {"stage": stage, "dataset": data.fingerprint, "config": settings}


def _matters(key: str, stage: str) -> bool:
    section, name = key.split(".")[0], key.split(".")[-1]
    others = (set(STAGES) | WITHOUT_EFFECT) - {stage}
    if stage == "clip" and name == "gradient_accumulation_steps":  # a contrastive loss depends on its batch
        return section == stage
    if key.startswith("data.pictures."):
        return name not in IDENTIFIED_BY_CONTENT
    return section not in others and name not in FREE


def check_trainable(config: Config, data: DataSet, stages: Iterable[str], processes: int = 1) -> None:
    """Refuse data that a later stage cannot take, before the first stage. Raises ConfigError."""
    if not data.survey:
        return
    if data.survey.listing.streamed and (set(stages) - {"denoiser"}):
        raise ConfigError(
            "a streamed data set is read in its own order only. Train the denoiser alone: --stage denoiser"
        )
    batch = config.clip.training.train_batch_size * processes
    if "clip" in stages and batch > len(data.training):
        raise ConfigError(
            f"clip.training.train_batch_size: {batch} a step is more than {len(data.training)} images. Make it smaller"
        )


def checkpoints_to_resume(folder: Path, stages: Iterable[str], resume: str) -> tuple[dict[str, Path | None], list[str]]:
    """The checkpoint to resume each stage from, None for a fresh start, and messages for the user.

    `latest` is the newest whole checkpoint of a stage, and requires one; `auto` starts fresh without one; anything else
    is a checkpoint's path, for its stage, without a fallback. Raises ModelError.
    """
    stages, notes = tuple(stages), []
    chosen = {} if resume in ("auto", "latest") else _chosen(Path(resume), stages)
    checkpoints: dict[str, Path | None] = {**chosen}
    for stage in (stage for stage in stages if stage not in chosen):
        checkpoints[stage], warnings = newest_whole(folder / stage / "checkpoints")
        notes += [f"warning: {warning}" for warning in warnings]
        if warnings and not checkpoints[stage]:
            raise ModelError(f"{warnings[0]} and none of {folder / stage / 'checkpoints'} is whole. Move them away")
    if not any(checkpoints.values()):
        where = folder / (stages[0] if len(stages) == 1 else "*") / "checkpoints"
        if resume == "latest":
            raise ModelError(f"no checkpoint in {where}. Use --resume auto to start fresh")
        notes.append(f"a new run: no checkpoint in {where}")
    return checkpoints, notes


def _chosen(path: Path, stages: tuple[str, ...]) -> dict[str, Path]:
    """A checkpoint by its path, under its stage. Raises ModelError."""
    check_whole(path)
    own = load_state(path).get("stage")
    if own not in stages:
        raise ModelError(f"checkpoint {path} belongs to stage {own}, which is not trained now ({', '.join(stages)})")
    return {own: path}


def prepared(
    config: AnySettings,
    folder: Path,
    accelerator: Accelerator,
    data: DataSet,
    stages: Iterable[str],
    interruption: Interruption,
    *,
    resume: str,
    allow_changed: bool,
) -> tuple[Run[AnySettings], list[str]]:
    """The run that goes on from its checkpoints, and messages for the user.

    resume: see `checkpoints_to_resume`; allow_changed: see `check_unchanged`. Raises ModelError, ConfigError.
    """
    checkpoints, notes = checkpoints_to_resume(folder, stages, resume)
    changed = check_unchanged(config, data, checkpoints, accelerator.num_processes, allow_changed)
    notes += rates_that_jump(config, folder, checkpoints)
    notes += [f"warning: going on although {change}" for change in changed]
    return Run(config, folder, accelerator, data, checkpoints, interruption), notes


def check_unchanged(
    config: Settings, data: DataSet, checkpoints: Mapping[str, Path | None], processes: int = 1, allow: bool = False
) -> list[str]:
    """Refuse to resume with settings that differ from the checkpoint's. Raises ConfigError, which lists old -> new.

    allow: return the list instead.
    """
    differences = [
        change
        for stage, path in checkpoints.items()
        if path
        for change in _changes(load_state(path), config, data, stage, processes)
    ]
    changes = list(dict.fromkeys(change.text for change in differences))
    if any(change.of_shapes for change in differences):
        raise ConfigError(f"cannot resume: {'; '.join(changes)}. The weights have other shapes: name another folder")
    if changes and not allow:
        raise ConfigError(f"cannot resume: {'; '.join(changes)}. Use --allow-changed to accept, or another run folder")
    return changes


class _Change(NamedTuple):
    """What differs from a checkpoint; of_shapes: the networks' weights then have other shapes."""

    text: str
    of_shapes: bool = False


def _changes_shapes(key: str, old: Any, new: Any) -> bool:
    """Whether a change of a setting is one of the networks' shapes."""
    if key == "autoencoder.kind" or key.rsplit(".", 1)[-1] in SHAPES:
        return True
    without = WITHOUT_LAYER.get(key)
    return without is not None and (old in without) != (new in without)


def rates_that_jump(config: Settings, folder: Path, checkpoints: Mapping[str, Path | None]) -> list[str]:
    """Warnings of stages that go on with a higher learning rate than they had reached: their schedule got longer."""
    jumps = []
    for stage, path in checkpoints.items():
        settings = getattr(config, stage).training
        step = load_state(path)["step"] if path else 0
        before = last_rate(folder / stage, step)
        if before is None or step >= settings.max_train_steps:
            continue
        now = learning_rate(step, settings)
        if now > 1.5 * before:
            jumps.append(
                f"warning: {stage} goes on at a learning rate of {now:.1e}, after {before:.1e} at step {step:,}: its "
                f"schedule ends later now. To go on as low, lower {stage}.training.learning_rate (--allow-changed)"
            )
    return jumps


def _changes(state: Mapping[str, Any], config: Settings, data: DataSet, stage: str, processes: int) -> list[_Change]:
    now = identity(config, stage, data)
    if state.get("stage") != stage:
        raise ModelError(f"a checkpoint of stage {state.get('stage')} lies where {stage} has its own. Move it away")
    try:
        changes = [_Change(text) for text in _dataset_changes(state["dataset"], now["dataset"])]
        batching = state["batching"]
        before = batching["batch_size"] * batching["accumulation_steps"] * batching["processes"]
        settings = {key: _plain(value) for key, value in now["config"].items()}
        old = state["config"]
        keys = sorted(key for key in set(old) | set(settings) if old.get(key) != settings.get(key))
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"a checkpoint of {stage} is damaged (state.json: {error})") from None
    training = getattr(config, stage).training
    batch = training.train_batch_size * training.gradient_accumulation_steps * processes
    for key, was, new in ((key, old.get(key), settings.get(key)) for key in keys if key != "data.count"):
        changes.append(_Change(f"{key} {was} -> {new}", _changes_shapes(key, was, new)))
    return changes + ([_Change(f"{stage} batch {before} -> {batch}")] if before != batch else [])


def _dataset_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Sequence[str]:
    if before["sha256"] == now["sha256"]:
        return []
    if before["images"] == now["images"]:
        return [f"dataset changed ({now['images']:,} images, others than before)"]
    return [f"dataset changed ({before['images']:,} -> {now['images']:,} images)"]


def _plain(value: Any) -> Any:
    """A value after a round trip through JSON."""
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
