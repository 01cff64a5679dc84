"""`latentdiff finetune`: train a model on your pictures. Flags have diffusers' names, and kohya's as a second name."""

from __future__ import annotations

from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from latentdiff.cli import terminal
from latentdiff.core.errors import ConfigError
from latentdiff.core.files import check_writable


class Method(StrEnum):
    """The methods of fine-tuning; see settings/finetuning.py."""

    full = "full"
    lora = "lora"
    dreambooth = "dreambooth"
    textual_inversion = "textual-inversion"
    controlnet = "controlnet"
    ip_adapter = "ip-adapter"
    consistency = "consistency"


class MixedPrecision(StrEnum):
    """The precision of the arithmetic."""

    no = "no"
    bf16 = "bf16"


def finetune(
    model: Annotated[str, typer.Argument(help="A folder, a .safetensors file or a hub id; scenes-64 is the default.")],
    data: Annotated[str, typer.Argument(help="A folder of pictures, .tar shards, .parquet files or a hub id.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", "--output-dir", help="Run folder, which gets the trained weights.")
    ],
    method: Annotated[Method | None, typer.Option(help="Method (default: lora).")] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file such as configs/finetune-lora.toml.")] = None,
    resolution: Annotated[
        int | None, typer.Option("--resolution", help="Side of pictures in pixels (default: the model's).")
    ] = None,
    train_batch_size: Annotated[
        int | None,
        typer.Option("--train-batch-size", "--batch-size", help="Pictures of a batch (default: the method's)."),
    ] = None,
    gradient_accumulation_steps: Annotated[
        int | None, typer.Option("--gradient-accumulation-steps", help="Batches of a step (default: 1).")
    ] = None,
    max_train_steps: Annotated[
        int | None, typer.Option("--max-train-steps", "--steps", help="Number of steps (default: the method's).")
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option("--learning-rate", "--lr", help="Learning rate (default: the method's, by the model's size)."),
    ] = None,
    lr_schedule: Annotated[
        str | None, typer.Option("--lr-scheduler", help="trapezoid, cosine, linear or constant.")
    ] = None,
    lr_warmup_steps: Annotated[
        int | None, typer.Option("--lr-warmup-steps", help="Steps of the warm-up (default: a tenth, at most 100).")
    ] = None,
    mixed_precision: Annotated[
        MixedPrecision | None, typer.Option("--mixed-precision", help="Precision of the arithmetic (default: no).")
    ] = None,
    use_8bit_adam: Annotated[
        bool, typer.Option("--use-8bit-adam", help="Use 8-bit AdamW; requires pip install 'latentdiff[8bit]'.")
    ] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory for a third more time.")
    ] = False,
    snr_gamma: Annotated[
        float | None, typer.Option("--snr-gamma", "--min-snr-gamma", help="Weight the loss by min-SNR with this gamma.")
    ] = None,
    noise_offset: Annotated[
        float | None,
        typer.Option("--noise-offset", help="Standard deviation of a constant added to each channel's noise."),
    ] = None,
    train_text_encoder: Annotated[
        bool, typer.Option("--train-text-encoder", help="Train the text encoder too.")
    ] = False,
    quantize: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="Quantize the frozen weights: int8, fp8, q8_0 or q4_0 (default: none)."),
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", "--network-dim", help="Rank of LoRA (default: 16).")] = None,
    alpha: Annotated[
        float | None, typer.Option("--alpha", "--network-alpha", help="Alpha of LoRA (default: the rank).")
    ] = None,
    rslora: Annotated[bool, typer.Option("--rslora", help="Scale by alpha / sqrt(rank).")] = False,
    dora: Annotated[
        bool, typer.Option("--dora", "--use-dora", help="DoRA: train lengths and directions separately.")
    ] = False,
    kohya: Annotated[bool, typer.Option("--kohya", help="Also write the LoRA under kohya's names.")] = False,
    instance_prompt: Annotated[
        str | None, typer.Option("--instance-prompt", help="The caption of pictures without one.")
    ] = None,
    class_prompt: Annotated[
        str | None, typer.Option("--class-prompt", help="The class whose pictures are preserved.")
    ] = None,
    class_images: Annotated[
        int | None, typer.Option("--num-class-images", help="Number of class pictures to draw (default: 100).")
    ] = None,
    prior_weight: Annotated[
        float | None, typer.Option("--prior-loss-weight", help="Weight of the class pictures' loss (default: 1).")
    ] = None,
    token: Annotated[
        str | None, typer.Option("--token", "--placeholder-token", help="The new word of textual-inversion.")
    ] = None,
    initial: Annotated[
        str | None,
        typer.Option("--initial", "--initializer-token", help="Known words that initialize the new word."),
    ] = None,
    vectors: Annotated[
        int | None, typer.Option("--num-vectors", help="Number of vectors of the new word (default: 1).")
    ] = None,
    control_pictures: Annotated[
        str | None,
        typer.Option("--control-pictures", help="A folder with the control picture of each picture, for a controlnet."),
    ] = None,
    annotator: Annotated[
        str | None,
        typer.Option("--annotator", help="Annotator that makes a controlnet's pictures: canny (default), blur, ..."),
    ] = None,
    image_encoder: Annotated[
        str | None,
        typer.Option("--image-encoder", help="CLIP's image tower for an ip-adapter (default: the model's own CLIP)."),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option("--validation-prompt", help="A prompt that every validation draws; may be repeated."),
    ] = None,
    held_out: Annotated[
        int | None,
        typer.Option("--validation-pictures", help="Number of pictures for the validation loss, held out of training."),
    ] = None,
    validation_steps: Annotated[
        int | None, typer.Option("--validation-steps", help="Steps between validations (default: a quarter of all).")
    ] = None,
    checkpointing_steps: Annotated[
        int | None, typer.Option("--checkpointing-steps", help="Steps between checkpoints (default: 250).")
    ] = None,
    checkpoints_total_limit: Annotated[
        int | None,
        typer.Option("--checkpoints-total-limit", help="Number of checkpoints to keep, at least 2 (default: 2)."),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of all random draws (default: 0).")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any other key of the config: data.pictures.flip=true.")
    ] = None,
    variant: Annotated[str | None, typer.Option(help="Variant of a folder's weights: fp16, ...")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub id: commit, tag or branch.")] = None,
    resume: Annotated[
        str,
        typer.Option("--resume", "--resume-from-checkpoint", help="auto (the latest, if any), latest, or a path."),
    ] = "auto",
    allow_changed: Annotated[
        bool, typer.Option("--allow-changed", help="Resume with settings that differ from the checkpoint's.")
    ] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out unusable pictures.")] = False,
    allow_missing_captions: Annotated[
        bool, typer.Option("--allow-missing-captions", help="Train pictures without a caption on the empty one.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and the time of a step, and stop.")
    ] = False,
) -> None:
    """Train a model on your pictures. After an interruption run the same command to resume.

    Writes pytorch_lora_weights.safetensors, model/, learned_embeds.safetensors, controlnet/ or ip_adapter/ into the run
    folder, with a model card and a page of pictures before and after.
    """
    from latentdiff.families.loading import DEFAULT_MODEL, name_of_included
    from latentdiff.settings.finetuning import load_finetuning

    for name, value in (("model", model), ("data", data)):
        if not value.strip():
            raise ConfigError(f"the {name} is empty")
    training = "finetune.training."
    options: dict[str, Any] = {
        "name": _name(output) if config is None else None,
        "model": None if name_of_included(model) == DEFAULT_MODEL else model,
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
        "quantize": quantize,
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
        "control.source": control_pictures,
        "control.annotator": annotator,
        "image_prompt.encoder": image_encoder,
        "previews.prompts": prompts,
        "seed": seed,
        "variant": variant,
        "revision": revision,
    }
    overrides = (*((key, value) for key, value in options.items() if value is not None), *(set_ or ()))
    load_finetuning(config, overrides)  # refused before anything is loaded
    check_writable(output, output)
    _check_run(output)
    for path in _finetune(config, overrides, output, resume, allow_changed, dry_run):
        terminal.result(path)


def _name(output: Path) -> str | None:
    """The folder's name if it can be a model's name, else None."""
    import re

    return output.name if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", output.name) else None


def _check_run(folder: Path) -> None:
    """Raises ConfigError for a folder of other files, which the page and the card could replace."""
    from latentdiff.settings.finetuning import FILE, STAGE

    if (folder / "config.toml").exists():
        raise ConfigError(f"{folder} holds another run, of `latentdiff train`. Choose another folder")
    if not folder.exists() or (folder / FILE).is_file():
        return
    begun = {"cache", "classes", "quarantine.jsonl", ".lock", STAGE}  # left by a start that was stopped early
    if others := sorted({path.name for path in folder.iterdir()} - begun):
        raise ConfigError(
            f"{folder} is not a run of `latentdiff finetune` ({others[0]} is in it). Choose another folder"
        )


def _finetune(
    path: Path | None, overrides: tuple[Any, ...], folder: Path, resume: str, allow_changed: bool, dry_run: bool
) -> list[Path]:
    from latentdiff.data.dataset import open_data
    from latentdiff.runtime.memory import keep_freed_memory
    from latentdiff.settings.finetuning import STAGE
    from latentdiff.stages.finetune import check_fits, finetune, load_settings_and_model, rehearse
    from latentdiff.stages.run import new_accelerator, prepared
    from latentdiff.training.interruption import Interruption
    from latentdiff.training.lock import locked
    from latentdiff.training.optim import check_optimizer

    keep_freed_memory()
    with Interruption() as interruption:
        config, model = load_settings_and_model(path, overrides)
        check_optimizer(config.finetune.training)
        accelerator = new_accelerator(config)
        with accelerator.main_process_first():
            data = open_data(config, None if dry_run else folder / "cache")
        check_fits(model, config, data)
        run, notes = prepared(
            config, folder, accelerator, data, [STAGE], interruption, resume=resume, allow_changed=allow_changed
        )
        if accelerator.is_main_process:
            terminal.note(*notes)
        if dry_run:
            terminal.note(*rehearse(run, model))
            return []
        with locked(folder) if accelerator.is_main_process else nullcontext():
            if accelerator.is_main_process:
                data.write_quarantine(folder)
            return finetune(run, model, terminal.note if accelerator.is_main_process else _nothing)


def _nothing(*lines: object) -> None:
    """Print nothing: another process does."""
