"""The pictures that controls read, and how they act on a batch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from latentdiff.core.annotators import annotator
from latentdiff.core.arrays import Array, Put
from latentdiff.core.errors import ConfigError
from latentdiff.diffusion.level import NoiseLevel
from latentdiff.drawing.canvas import pixels_of, resized
from latentdiff.drawing.request import Request
from latentdiff.networks.controls.controlled import Control


@dataclass(frozen=True, eq=False)
class Hint:
    """The picture of one control: uint8 (H, W, 3), its file's name if known, and the annotator that made it if any."""

    pixels: np.ndarray
    name: str | None = None
    annotator: str | None = None

    def sized(self, height: int, width: int) -> np.ndarray:
        """float32 (1, 3, H, W) in [0, 1], resized by Lanczos."""
        return resized(self.pixels, height, width).transpose(2, 0, 1)[None].astype(np.float32) / 255

    def picture(self) -> Image.Image:
        """The same as a PIL image."""
        return Image.fromarray(self.pixels)

    def record(self) -> dict[str, Any]:
        """The entry in the record of a picture that it steered."""
        digest = hashlib.sha256(repr(self.pixels.shape).encode() + self.pixels.tobytes())
        return {"image": self.name, "annotator": self.annotator, "sha256": digest.hexdigest()}


def hints_of(
    images: Any, count: int, names: Sequence[str | None] = (), annotated: str | None = None
) -> tuple[Hint, ...]:
    """The hints of that many controls, from one picture or a list. annotated: the annotator that is applied first.

    Raises ConfigError.
    """
    listed = images if isinstance(images, list | tuple) else [] if images is None else [images]
    if len(listed) != count:
        loaded = "no ControlNet is loaded" if not count else f"{count} ControlNets are loaded"
        raise ConfigError(f"{len(listed)} control pictures, and {loaded} (load_controlnet, --control)")
    padded = [*names, *[None] * (count - len(names))]
    change = (lambda pixels: pixels) if annotated is None else annotator(annotated)
    return tuple(Hint(change(pixels_of(image)), name, annotated) for image, name in zip(listed, padded, strict=True))


def controls_of(
    networks: Sequence[Any],
    hints: Sequence[Sequence[Hint]],
    request: Request,
    levels: Sequence[NoiseLevel],
    size: tuple[int, int],
    put: Put,
) -> list[Control]:
    """The controls of a walk through levels, whose times follow from the shares of its steps, as in diffusers.

    hints: of each picture of the batch. put: an array where the networks are.
    """
    controls = []
    for index, (network, *own) in enumerate(zip(networks, *hints, strict=True)):
        picture: Array = put(np.concatenate([hint.sized(*size) for hint in own]))
        start, end = (
            value_of(request.control_guidance_start, index, 0.0),
            value_of(request.control_guidance_end, index, 1.0),
        )
        controls.append(
            Control(
                network,
                picture,
                value_of(request.controlnet_conditioning_scale, index, 1.0),
                _times(levels, start, end),
                request.guess_mode,
                int(value_of(request.control_mode, index, 0)),
            )
        )
    return controls


def value_of(values: Sequence[Any], index: int, default: Any) -> Any:
    """A control's own value; one value is for all of them."""
    return default if not values else values[0] if len(values) == 1 else values[index]


def _times(levels: Sequence[NoiseLevel], start: float, end: float) -> tuple[float, float]:
    """The times between which a control acts: of the steps i of n with i / n >= start and (i + 1) / n <= end."""
    n = len(levels) - 1
    active = [i for i in range(n) if i / n >= start and (i + 1) / n <= end]
    if not active:
        return math.inf, math.inf
    last = active[-1] + 1
    return (-math.inf if last == n else float(levels[last].t)), float(levels[active[0]].t)
