"""A model and what is used beside it, as several commands name them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentdiff.core.errors import ConfigError

if TYPE_CHECKING:
    from latentdiff.cli.options import Precision, Runtime, Speed
    from latentdiff.pipeline import LatentDiffusionPipeline

_OPTIONS = {  # what looks like a setting and is an option, by either of their names
    "image": "image",
    "mask": "mask",
    "mask_image": "mask",
    "outpaint": "outpaint",
    "model": "model",
    "lora": "lora",
    "device": "device",
    "dtype": "dtype",
    "output": "output",
}


def common_settings(given: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """What all pictures have in common: the options that are given, and settings as in a config: TOML, or a bare word.

    Raises ConfigError for what is an option alone, and for what is given twice.
    """
    common = {name: value for name, value in given.items() if value is not None}
    for setting in settings:
        from latentdiff.settings.config import parsed_override

        name, value = parsed_override(setting)
        if not name:
            raise ConfigError(f"--set is NAME=VALUE (got {setting[:40]!r})")
        if name == "prompt":
            raise ConfigError("the prompt is an argument, not a setting")
        if name in _OPTIONS:
            raise ConfigError(f"{name} is no setting: give it as --{_OPTIONS[name]}")
        if name in common:
            raise ConfigError(f"{name} is given twice")
        common[name] = value
    return {"num_images": 1} | common


def adapter_and_weight(text: str) -> tuple[Path, float]:
    """PATH or PATH:WEIGHT; a path may hold colons of its own. Raises ConfigError."""
    path, colon, weight = text.rpartition(":")
    try:
        return (Path(path), float(weight)) if colon else (Path(text), 1.0)
    except ValueError:
        if os.path.lexists(path) and not os.path.lexists(text):
            raise ConfigError(f"--lora is PATH:WEIGHT, and {weight[:40]!r} is no number") from None
        return Path(text), 1.0


def named(path: str | None) -> str | None:
    """None for the default model, which may be called by its name."""
    from latentdiff.families.loading import DEFAULT_MODEL

    return None if path == DEFAULT_MODEL and not Path(path).exists() else path


def loaded(
    model: str | None,
    device: str | None,
    dtype: Precision | None,
    variant: str | None,
    revision: str | None,
    runtime: Runtime,
    speed: Speed | None = None,
) -> LatentDiffusionPipeline:
    """The pipeline of a model, as the options say."""
    from latentdiff.pipeline import LatentDiffusionPipeline

    return LatentDiffusionPipeline.from_pretrained(
        model,
        device=device,
        torch_dtype=dtype and dtype.value,
        variant=variant,
        revision=revision,
        runtime=runtime.value,
        speed=speed and speed.value,
    )


def load_extras(
    pipe: LatentDiffusionPipeline,
    loras: Sequence[tuple[Path, float]],
    embeddings: Sequence[Path],
    vae: Path | None,
) -> None:
    """Load what is drawn with beside the model, and say how adapters fit."""
    for number, (path, weight) in enumerate(loras, 1):  # two files may be called the same
        name = f"{path.stem}_{number}" if [p.stem for p, _ in loras].count(path.stem) > 1 else None
        print(pipe.load_lora_weights(path, name, weight=weight, fuse=True), file=sys.stderr)
    for path in embeddings:
        print(f"words: {', '.join(pipe.load_textual_inversion(path))}", file=sys.stderr)
    if vae is not None:
        pipe.load_vae(vae)
