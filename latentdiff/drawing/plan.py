"""How many steps each pass takes, and what size it has: arithmetic that needs no network."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from latentdiff.core.errors import ConfigError
from latentdiff.drawing.request import Request

if TYPE_CHECKING:
    from latentdiff.drawing.canvas import Canvas

Size = tuple[int, int]  # (height, width) in pixels
Item = TypeVar("Item")


def strength_of(asked: Request, masked: bool) -> float:
    """How much of a given picture is noised."""
    return asked.strength if asked.strength is not None else 1.0 if masked else 0.8


def hires_strength_of(asked: Request) -> float:
    """How much of the first pass's enlarged picture is noised."""
    return 0.5 if asked.hires_strength is None else asked.hires_strength


def shortened(levels: tuple[Item, ...], strength: float) -> tuple[Item, ...]:
    """The last int(steps * strength) steps, as in SDEdit (Meng et al. 2022). Raises ConfigError where none is left."""
    steps = len(levels) - 1
    kept = min(int(steps * strength), steps)
    if kept < 1:
        raise ConfigError(f"strength {strength:g} of {steps} steps is not one step. More of either")
    return levels[-(kept + 1) :]


def step_counts(asked: Request, canvas: Canvas | None = None) -> tuple[int, ...]:
    """How many steps each pass takes. Raises ConfigError where a pass has none."""
    levels = (None,) * (asked.num_inference_steps + 1)
    first = levels if canvas is None else shortened(levels, strength_of(asked, canvas.mask is not None))
    passes = [first] if asked.hires_scale is None else [first, shortened(levels, hires_strength_of(asked))]
    return tuple(len(some) - 1 for some in passes)


def enlarged(size: Size, asked: Request, multiple: int) -> Size:
    """The size of the last pass: that of the first times hires_scale, in multiples of what can be drawn."""
    if asked.hires_scale is None:
        return size
    height, width = (max(1, round(side * asked.hires_scale / multiple)) * multiple for side in size)
    return height, width
