"""Loading of a model, its adapters, words and VAE, for several commands."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from latentdiff.cli import terminal
from latentdiff.core.errors import ConfigError

if TYPE_CHECKING:
    from latentdiff.cli.options import Precision, Runtime, Speed
    from latentdiff.pipeline import LatentDiffusionPipeline

_OPTIONS = {  # names that look like settings but are options
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


def common_settings(options: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """The settings of all pictures: the options, and --set NAME=VALUE with TOML values or bare words.

    Raises ConfigError for a setting that only exists as an option, and for a setting that is given twice.
    """
    common = {name: value for name, value in options.items() if value is not None}
    for setting in settings:
        from latentdiff.settings.config import parsed_override

        name, value = parsed_override(setting)
        if not name:
            raise ConfigError(f"--set must be NAME=VALUE (got {setting[:40]!r})")
        if name == "prompt":
            raise ConfigError("the prompt is an argument, not a setting")
        if name in _OPTIONS:
            raise ConfigError(f"{name} is not a setting: use --{_OPTIONS[name]}")
        if name in common:
            raise ConfigError(f"{name} is given twice")
        common[name] = value
    return common


def adapter_and_weight(text: str) -> tuple[Path, float]:
    """The path and the weight of PATH or PATH:WEIGHT; a path may contain colons. Raises ConfigError."""
    path, weight = _path_and_number(text, "--lora must be PATH:WEIGHT")
    return path, 1.0 if weight is None else weight


def picture_and_scale(text: str) -> tuple[Path, float | None]:
    """The path and the scale of PICTURE or PICTURE:SCALE; a path may contain colons. Raises ConfigError."""
    return _path_and_number(text, "--image-prompt must be PICTURE:SCALE")


def _path_and_number(text: str, rule: str) -> tuple[Path, float | None]:
    path, colon, number = text.rpartition(":")
    if os.path.lexists(text):
        return Path(text), None
    try:
        return (Path(path), float(number)) if colon else (Path(text), None)
    except ValueError:
        if os.path.lexists(path):
            raise ConfigError(f"{rule}, and {number[:40]!r} is not a number") from None
        return Path(text), None


class ControlOption(NamedTuple):
    """A ControlNet, the picture that it reads, and its scale."""

    network: Path
    picture: Path
    scale: float | None


def control_option(text: str) -> ControlOption:
    """MODEL:PICTURE or MODEL:PICTURE:SCALE; both paths may contain colons if they exist. Raises ConfigError."""
    rest, colon, last = text.rpartition(":")
    scale, is_number = None, False
    if colon and not os.path.lexists(last):
        with suppress(ValueError):  # else it is a missing picture, reported when it is opened
            scale, is_number = float(last), True
    paths = (rest if is_number else text).split(":")
    places = range(1, len(paths))
    fitting = (i for i in places if all(os.path.lexists(":".join(part)) for part in (paths[:i], paths[i:])))
    i = next(fitting, len(paths) - 1)
    network, picture = ":".join(paths[:i]), ":".join(paths[i:])
    if not (network and picture):
        raise ConfigError(f"--control must be MODEL:PICTURE or MODEL:PICTURE:SCALE (got {text[:60]!r})")
    return ControlOption(Path(network), Path(picture), scale)


def load_controls(pipe: LatentDiffusionPipeline, controls: Sequence[ControlOption], annotate: str | None) -> Any:
    """Load ControlNets; returns the hints of their pictures. annotate: the annotator that makes the pictures."""
    from latentdiff.core.files import recorded
    from latentdiff.drawing.files import open_picture
    from latentdiff.drawing.hints import hints_of

    pictures = [open_picture(control.picture) for control in controls]
    for control in controls:
        pipe.load_controlnet(control.network)
    return hints_of(pictures, len(controls), [recorded(control.picture) for control in controls], annotate)


def load_image_prompts(pipe: LatentDiffusionPipeline, adapters: Sequence[Path], pictures: Sequence[Path]) -> Any:
    """Load IP-Adapters; returns their pictures: one adapter has all, several one each. Raises ConfigError."""
    from latentdiff.core.files import recorded
    from latentdiff.drawing.files import open_picture
    from latentdiff.drawing.image_prompts import image_prompts_of

    opened, names = [open_picture(picture) for picture in pictures], [recorded(picture) for picture in pictures]
    for adapter in adapters:
        pipe.load_ip_adapter(adapter)
    if len(adapters) == 1:
        return image_prompts_of([opened], None, 1, [names])
    return image_prompts_of(opened, None, len(adapters), [[name] for name in names])


def embedding_and_word(text: str) -> tuple[Path, str | None]:
    """The path of PATH or WORD=PATH, and the word; a path may contain equals signs."""
    word, equals, path = text.partition("=")
    return (Path(text), None) if not equals or os.path.lexists(text) else (Path(path), word)


def loaded(
    model: str | None,
    device: str | None,
    dtype: Precision | None,
    variant: str | None,
    revision: str | None,
    runtime: Runtime,
    speed: Speed | None = None,
    quantize: str | None = None,
) -> LatentDiffusionPipeline:
    """The pipeline of a model, with the command's options."""
    from latentdiff.pipeline import LatentDiffusionPipeline

    return LatentDiffusionPipeline.from_pretrained(
        model,
        device=device,
        torch_dtype=dtype and dtype.value,
        variant=variant,
        revision=revision,
        runtime=runtime.value,
        speed=speed and speed.value,
        quantize=quantize,
    )


def load_extras(
    pipe: LatentDiffusionPipeline,
    loras: Sequence[tuple[Path, float]],
    embeddings: Sequence[tuple[Path, str | None]],
    vae: Path | None,
) -> None:
    """Load adapters, words and another VAE, and print how adapters fit."""
    fused = bool(loras) and not pipe.is_quantized
    for number, (path, weight) in enumerate(loras, 1):  # two files may have the same name
        name = f"{path.stem}_{number}" if [p.stem for p, _ in loras].count(path.stem) > 1 else None
        terminal.note(pipe.load_lora_weights(path, name, weight=weight, fuse=fused))
    for path, word in embeddings:
        terminal.note(f"words: {', '.join(pipe.load_textual_inversion(path, word))}")
    if vae is not None:
        pipe.load_vae(vae)
