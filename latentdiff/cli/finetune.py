"""`latentdiff finetune`: a model is taught somebody's pictures. Flags are diffusers', kohya's where they differ too."""

from __future__ import annotations

from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from latentdiff.cli.loading import named
from latentdiff.core.errors import ConfigError
from latentdiff.core.files import check_writable


class Method(StrEnum):
    """See settings/finetuning.py."""

    full = "full"
    lora = "lora"
    dreambooth = "dreambooth"
    textual_inversion = "textual-inversion"


class MixedPrecision(StrEnum):
    """Of the arithmetic."""

    no = "no"
    bf16 = "bf16"


def finetune(
    model: Annotated[str, typer.Argument(help="A folder, a .safetensors file or a hub id; scenes-64 is the default.")],
    data: Annotated[str, typer.Argument(help="A folder of pictures, .tar shards, .parquet files or a hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", "--output-dir", help="Run folder, with what is learnt.")],
    method: Annotated[Method | None, typer.Option(help="What is trained (default: lora).")] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file such as configs/finetune-lora.toml.")] = None,
    resolution: Annotated[int | None, typer.Option("--resolution", help="Side (default: the model's).")] = None,
    train_batch_size: Annotated[
        int | None,
        typer.Option("--train-batch-size", "--batch-size", help="Pictures at a time (default: the method's)."),
    ] = None,
    gradient_accumulation_steps: Annotated[
        int | None, typer.Option("--gradient-accumulation-steps", help="How many times a step (default: 1).")
    ] = None,
    max_train_steps: Annotated[
        int | None, typer.Option("--max-train-steps", "--steps", help="(default: the method's)")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", "--lr", help="(default: the method's, by the model's size)")
    ] = None,
    lr_schedule: Annotated[
        str | None, typer.Option("--lr-scheduler", help="trapezoid, cosine, linear or constant.")
    ] = None,
    lr_warmup_steps: Annotated[
        int | None, typer.Option("--lr-warmup-steps", help="(default: a tenth, at most 100)")
    ] = None,
    mixed_precision: Annotated[
        MixedPrecision | None, typer.Option("--mixed-precision", help="Of the arithmetic (default: no).")
    ] = None,
    use_8bit_adam: Annotated[bool, typer.Option("--use-8bit-adam", help="pip install 'latentdiff[8bit]'.")] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory for a third more time.")
    ] = False,
    snr_gamma: Annotated[
        float | None, typer.Option("--snr-gamma", "--min-snr-gamma", help="Weigh the loss by min-SNR with this gamma.")
    ] = None,
    noise_offset: Annotated[
        float | None, typer.Option("--noise-offset", help="Deviation of a constant added to the noise.")
    ] = None,
    train_text_encoder: Annotated[
        bool, typer.Option("--train-text-encoder", help="The text encoder is taught too.")
    ] = False,
    rank: Annotated[int | None, typer.Option("--rank", "--network-dim", help="Of LoRA (default: 16).")] = None,
    alpha: Annotated[
        float | None, typer.Option("--alpha", "--network-alpha", help="Of LoRA (default: the rank).")
    ] = None,
    rslora: Annotated[bool, typer.Option("--rslora", help="Scale by alpha / sqrt(rank).")] = False,
    dora: Annotated[bool, typer.Option("--dora", "--use-dora", help="Train lengths and directions apart.")] = False,
    kohya: Annotated[bool, typer.Option("--kohya", help="Write the LoRA under kohya's names too.")] = False,
    instance_prompt: Annotated[
        str | None, typer.Option("--instance-prompt", help="The caption of pictures that have none.")
    ] = None,
    class_prompt: Annotated[
        str | None, typer.Option("--class-prompt", help="Of the class whose pictures are kept as they were.")
    ] = None,
    class_images: Annotated[
        int | None, typer.Option("--num-class-images", help="How many are drawn (default: 100).")
    ] = None,
    prior_weight: Annotated[
        float | None, typer.Option("--prior-loss-weight", help="Of the class beside the thing (default: 1).")
    ] = None,
    token: Annotated[
        str | None, typer.Option("--token", "--placeholder-token", help="The new word of textual-inversion.")
    ] = None,
    initial: Annotated[
        str | None,
        typer.Option(
            "--initial", "--initializer-token", help="What the word is like, in known ones; it begins as they are."
        ),
    ] = None,
    vectors: Annotated[int | None, typer.Option("--num-vectors", help="How many it stands for (default: 1).")] = None,
    prompts: Annotated[
        list[str] | None, typer.Option("--validation-prompt", help="Drawn at every validation; may be repeated.")
    ] = None,
    held_out: Annotated[
        int | None, typer.Option("--validation-pictures", help="Held out of training, for the validation loss.")
    ] = None,
    validation_steps: Annotated[
        int | None, typer.Option("--validation-steps", help="How often (default: four times).")
    ] = None,
    checkpointing_steps: Annotated[
        int | None, typer.Option("--checkpointing-steps", help="How often (default: every 250).")
    ] = None,
    checkpoints_total_limit: Annotated[
        int | None, typer.Option("--checkpoints-total-limit", help="How many are kept, at least and by default 2.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of all that is drawn (default: 0).")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any other key of the config: data.pictures.flip=true.")
    ] = None,
    variant: Annotated[str | None, typer.Option(help="Of a folder's weights: fp16, ...")] = None,
    revision: Annotated[str | None, typer.Option(help="Of a hub id: commit, tag or branch.")] = None,
    resume: Annotated[
        str,
        typer.Option("--resume", "--resume-from-checkpoint", help="auto, latest, or a checkpoint's path."),
    ] = "auto",
    allow_changed: Annotated[
        bool, typer.Option("--allow-changed", help="Go on under other settings than the checkpoint's.")
    ] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out pictures that cannot be used.")] = False,
    allow_missing_captions: Annotated[
        bool, typer.Option("--allow-missing-captions", help="Teach pictures without a caption on the empty one.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, with a step's time, and stop.")] = False,
) -> None:
    """Teach a model your pictures. Goes on where an earlier start stopped.

    Writes pytorch_lora_weights.safetensors, model/ or learned_embeds.safetensors into the run folder, with a model card
    and a page of pictures before and after.
    """
    from latentdiff.settings.finetuning import load_finetuning

    for name, value in (("model", model), ("data", data)):
        if not value.strip():
            raise ConfigError(f"the {name} is empty")
    training = "finetune.training."
    given: dict[str, Any] = {
        "name": _name(output) if config is None else None,
        "model": named(model),
        "data.kind": "pictures",
        "data.pictures.source": data,
        "method": method and method.value,
        "image_size": resolution,
        training + "train_batch_size": train_batch_size,
        training + "gradient_accumulation_steps": gradient_accumulation_steps,
        training + "max_train_steps": max_train_steps,
        training + "learning_rate": learning_rate,
        training + "lr_schedule": lr_schedule,
        training + "lr_warmup_steps": lr_warmup_steps,
        training + "optimizer": "adamw_8bit" if use_8bit_adam else None,
        training + "validation_steps": validation_steps,
        training + "checkpointing_steps": checkpointing_steps,
        training + "checkpoints_total_limit": checkpoints_total_limit,
        "mixed_precision": mixed_precision and mixed_precision.value,
        "finetune.gradient_checkpointing": gradient_checkpointing or None,
        "finetune.weighting": None if snr_gamma is None else "min_snr",
        "finetune.snr_gamma": snr_gamma,
        "finetune.noise_offset": noise_offset,
        "finetune.tune_text_encoder": train_text_encoder or None,
        "lora.rank": rank,
        "lora.alpha": alpha,
        "lora.rslora": rslora or None,
        "lora.dora": dora or None,
        "lora.kohya": kohya or None,
        "data.pictures.instance_prompt": instance_prompt,
        "data.pictures.skip_bad": skip_bad or None,
        "data.pictures.allow_missing_captions": allow_missing_captions or None,
        "data.pictures.validation_pictures": held_out,
        "prior.prompt": class_prompt,
        "prior.pictures": class_images,
        "prior.weight": prior_weight,
        "word.token": token,
        "word.initial": initial,
        "word.vectors": vectors,
        "shown.prompts": prompts,
        "seed": seed,
        "variant": variant,
        "revision": revision,
    }
    overrides = (*((key, value) for key, value in given.items() if value is not None), *(set_ or ()))
    load_finetuning(config, overrides)  # refused here before anything is loaded
    check_writable(output, output)
    _check_run(output)
    for path in _finetune(config, overrides, output, resume, allow_changed, dry_run):
        typer.echo(path)


def _name(output: Path) -> str | None:
    """The folder's, where it can be a model's."""
    import re

    return output.name if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", output.name) else None


def _check_run(folder: Path) -> None:
    """Refuse a folder of something else: the page and the card would be written over its own. Raises ConfigError."""
    from latentdiff.settings.finetuning import FILE, STAGE

    if (folder / "config.toml").exists():
        raise ConfigError(f"{folder} holds another run, of `latentdiff train`. Choose another folder")
    if not folder.exists() or (folder / FILE).is_file():
        return
    begun = {"cache", "classes", "quarantine.jsonl", ".lock", STAGE}  # by a start that was stopped early
    if others := sorted({path.name for path in folder.iterdir()} - begun):
        raise ConfigError(f"{folder} is no run of `latentdiff finetune` ({others[0]} is in it). Choose another folder")


def _finetune(
    path: Path | None, overrides: tuple[Any, ...], folder: Path, resume: str, allow_changed: bool, dry_run: bool
) -> list[Path]:
    import shutil
    from functools import partial

    from latentdiff.data.dataset import open_data
    from latentdiff.runtime.memory import keep_freed_memory
    from latentdiff.settings.finetuning import STAGE
    from latentdiff.stages.finetune import check_fits, finetune, opened, rehearse
    from latentdiff.stages.run import Run, check_unchanged, checkpoints_to_resume, new_accelerator
    from latentdiff.training.interruption import Interruption
    from latentdiff.training.lock import locked
    from latentdiff.training.optim import check_optimizer

    keep_freed_memory()
    with Interruption() as interruption:
        config, model = opened(path, overrides)
        check_optimizer(config.finetune.training)
        accelerator = new_accelerator(config)
        with accelerator.main_process_first():
            data = open_data(config, None if dry_run else folder / "cache")
        check_fits(model, config, data)
        checkpoints, notes = checkpoints_to_resume(folder, [STAGE], resume)
        changed = check_unchanged(config, data, checkpoints, accelerator.num_processes, allow_changed)
        run = Run(config, folder, accelerator, data, checkpoints, interruption)
        if accelerator.is_main_process:
            for line in [*notes, *(f"warning: going on although {change}" for change in changed)]:
                typer.echo(line, err=True)
        if dry_run:
            typer.echo(rehearse(run, model), err=True)
            return []
        with locked(folder) if accelerator.is_main_process else nullcontext():
            if accelerator.is_main_process:
                data.write_quarantine(folder)
                for left in folder.glob(".latentdiff-*"):  # by a kill while a model was written
                    shutil.rmtree(left, ignore_errors=True)
            return finetune(run, model, partial(typer.echo, err=True) if accelerator.is_main_process else _nothing)


def _nothing(text: str) -> None:
    """One process speaks for all."""
