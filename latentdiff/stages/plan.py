"""The plan of a start, printed before it begins: pictures, batches, steps, epochs, parameters, memory and disk."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from latentdiff.core.processor import multiplies_bfloat16
from latentdiff.data.pictures import PictureSet
from latentdiff.families.own import new_backbone, new_clip, new_codec
from latentdiff.settings.config import Config, Training
from latentdiff.stages.classes import classes_of
from latentdiff.stages.run import Run
from latentdiff.training.checkpoint import label, load_state
from latentdiff.training.loop import Batching

MANY_EPOCHS = 400  # of a fine-tuning


class Weights(NamedTuple):
    """Bytes of a stage's trained weights, and of the frozen ones beside them."""

    trained: int
    frozen: int = 0


def plan_of(run: Run[Config]) -> list[str]:
    """The plan of the stages of a config."""
    classes = 1 if run.config.reads_texts else len(classes_of(run.data.training))
    return plan_lines(run, {stage: _weights(run.config, stage, classes) for stage in run.stages})


def plan_lines(run: Run[Any], weights: Mapping[str, Weights | None]) -> list[str]:
    """The plan of a start, a line or two a stage; None stands for a stage without training."""
    lines = [
        f"run {run.folder} on {run.accelerator.device} x {run.accelerator.num_processes}, "
        f"mixed precision {run.config.mixed_precision}, seed {run.config.seed}",
        *_data_lines(run),
    ]
    if (keys := _emulated(run)) and run.accelerator.device.type == "cpu" and not multiplies_bfloat16():
        lines.append(f"warning: this processor only emulates bfloat16 ({keys}): float32 is faster here")
    needed = 0
    for stage in run.stages:
        size = weights[stage]
        if size is None:
            lines.append(f"{stage}: none, pixels stay as they are")
            continue
        settings: Training = getattr(run.config, stage).training
        checkpoint = 4 * size.trained  # weights, average and two moments
        needed += checkpoint * (settings.checkpoints_total_limit + 1)
        lines += [_steps_line(run, stage, settings), _size_line(size, checkpoint, settings)]
        if _batching(run, settings).global_batch > len(run.data.training):
            lines.append("    warning: a step takes more pictures than there are")
        if stage == "finetune" and (epochs := _epochs(run, settings)) > MANY_EPOCHS:
            lines.append(f"    every picture is seen {epochs:,.0f} times; 50 to 200 are usual (--max-train-steps)")
    free = shutil.disk_usage(next(path for path in (run.folder, *run.folder.absolute().parents) if path.exists())).free
    lines.append(f"disk: checkpoints up to {_size(needed)}, {_size(free)} free")
    if needed > free:
        lines.append("warning: the disk may fill up before the end")
    return lines


def _emulated(run: Run[Any]) -> str:
    """The keys that ask for bfloat16."""
    stages = [stage for stage in run.stages if getattr(getattr(run.config, stage), "encode_dtype", "") == "bfloat16"]
    keys = [f"{stage}.encode_dtype" for stage in stages]
    return ", ".join(["mixed_precision", *keys] if run.config.mixed_precision == "bf16" else keys)


def _data_lines(run: Run[Any]) -> list[str]:
    """Lines about the user's pictures: their number, repeats, buckets, and what is left out."""
    survey, training = run.data.survey, run.data.training
    if not survey:
        return []
    source = run.config.data.pictures.source
    line = f"data: {survey.count:,} images ({survey.listing.layout}, {source}), {len(training):,} samples an epoch"
    if survey.quarantined:
        line += f", {len(survey.quarantined):,} left out (quarantine.jsonl)"
    sizes = [f"{w}x{h}: {len(rows):,}" for (h, w), rows in training.pictures.buckets().items()]
    buckets = f"    in {len(sizes)} buckets, {', '.join(sizes)}"
    if isinstance(training.pictures, PictureSet):
        buckets += f"; {training.pictures.cropped_share():.1%} cropped away"
    return [line, buckets, *(f"    {note}" for note in survey.listing.notes)]


def _batching(run: Run[Any], settings: Training) -> Batching:
    return Batching(settings.train_batch_size, settings.gradient_accumulation_steps, run.accelerator.num_processes)


def _epochs(run: Run[Any], settings: Training) -> float:
    """How often a training sees each sample."""
    return settings.max_train_steps * _batching(run, settings).global_batch / len(run.data.training)


def _steps_line(run: Run[Any], stage: str, settings: Training) -> str:
    batching = _batching(run, settings)
    checkpoint = run.checkpoints[stage]
    done = load_state(checkpoint)["step"] if checkpoint else 0
    where = f"from {label(checkpoint)} ({checkpoint})" if checkpoint else "to train"
    steps = max(settings.max_train_steps - done, 0)
    batch = (
        f"{batching.batch_size} x {batching.accumulation_steps} accumulated x {batching.processes} processes = "
        f"{batching.global_batch} pictures a step"
    )
    line = f"{stage}: {steps:,} of {settings.max_train_steps:,} steps {where}, {batch}"
    if stage in ("denoiser", "finetune"):  # with scenes the other stages never repeat one
        count = len(run.data.training)
        line += f"; {count:,} pictures, {_epochs(run, settings):,.1f} epochs"
    return line


def _size_line(size: Weights, checkpoint: int, settings: Training) -> str:
    frozen = f", {_size(size.frozen)} for frozen weights" if size.frozen else ""
    return (
        f"    {size.trained / 4e6:.3g} M parameters, {_size(5 * size.trained)} for weights, gradients, moments and "
        f"average{frozen}; a checkpoint of {_size(checkpoint)} every {settings.checkpointing_steps:,} steps"
    )


def _weights(config: Config, stage: str, classes: int) -> Weights | None:
    module = _module(config, stage, classes)
    return None if module is None else Weights(sum(parameter.nbytes for parameter in module.parameters()))


def _module(config: Config, stage: str, classes: int) -> nn.Module | None:
    """The module that a stage trains, on the meta device."""
    with torch.device("meta"):
        autoencoder = new_codec(config)
        if stage == "autoencoder":
            return autoencoder if config.autoencoder.kind != "identity" else None
        if stage == "clip":
            return new_clip(config)
        side = config.image_size // autoencoder.factor
        return new_backbone(config, autoencoder.latent_channels, side, classes)


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
