"""The plan of a picture, its sizes and the steps of each pass, made once and without any network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from latentdiff.core.errors import ConfigError
from latentdiff.drawing.request import Request, check_size

if TYPE_CHECKING:
    from latentdiff.drawing.canvas import Canvas
    from latentdiff.model import Model

Size = tuple[int, int]  # (height, width) in pixels
Item = TypeVar("Item")


@dataclass(frozen=True)
class PlannedPass:
    """The size and the number of steps of a pass. strength: the share of the noise that an input picture gets."""

    size: Size
    steps: int
    strength: float = 1.0


@dataclass(frozen=True)
class Plan:
    """The passes of a picture, in order."""

    passes: tuple[PlannedPass, ...]

    @property
    def size(self) -> Size:
        """The size of the first pass, which all pictures of a batch share."""
        return self.passes[0].size

    @property
    def final(self) -> Size:
        """The size of the last pass."""
        return self.passes[-1].size

    @property
    def steps(self) -> tuple[int, ...]:
        """The number of steps of each pass."""
        return tuple(planned.steps for planned in self.passes)


def plan(request: Request, model: Model, canvas: Canvas | None = None) -> Plan:
    """The plan of a request's picture. Raises ConfigError for a size that the model cannot draw, or for no steps."""
    steps = request.num_inference_steps
    if steps > model.path.T:
        raise ConfigError(f"num_inference_steps must be at most {model.path.T} for this model (got {steps})")
    if canvas is None and (model.must_edit or model.enlarging is not None):
        does = "edits" if model.enlarging is None else "enlarges"
        raise ConfigError(f"this model {does} a picture: give one (image, --image)")
    _check_levels(request, model)
    size = _first_size(request, model, canvas)
    strength = (
        1.0
        if canvas is None
        else strength_of(request, canvas.mask is not None or model.edits or model.enlarging is not None)
    )
    passes = [PlannedPass(size, steps if canvas is None else kept_steps(steps, strength), strength)]
    if request.hires_scale is not None:
        height, width = (max(1, round(side * request.hires_scale / model.multiple)) * model.multiple for side in size)
        for name, side in (("height", height), ("width", width)):
            check_size(f"{name} after hires_scale", side, model.multiple)
        strength = 0.5 if request.hires_strength is None else request.hires_strength
        passes.append(PlannedPass((height, width), kept_steps(steps, strength, "hires_strength"), strength))
    return Plan(tuple(passes))


def _check_levels(request: Request, model: Model) -> None:
    """Check the caller's own times or sigmas. Raises ConfigError."""
    try:
        for t in request.timesteps or ():
            model.path.level(t)
        for sigma in request.sigmas or ():
            model.path.level_of_sigma(sigma)
    except ValueError as error:
        raise ConfigError(f"{'timesteps' if request.timesteps else 'sigmas'}: {error}") from None


def _first_size(request: Request, model: Model, canvas: Canvas | None) -> Size:
    if canvas is not None:
        height, width = (canvas.enlarged * side for side in canvas.pixels.shape[:2])
        if canvas.enlarged * min(canvas.size) < model.multiple:
            size = f"{canvas.size[1]}x{canvas.size[0]} pixels, less than {model.multiple}. Enlarge it (width, height)"
            raise ConfigError(f"{canvas.names[0] or 'the image'} has {size}")
    else:
        height = model.card.size[0] if request.height is None else request.height
        width = model.card.size[1] if request.width is None else request.width
    largest = model.backbone.spec.largest
    if largest is not None and max(height, width) > largest * model.codec.factor:
        raise ConfigError(f"sides must be at most {largest * model.codec.factor} for this model (got {width}x{height})")
    side = model.backbone.spec.side
    if side is not None and {height, width} != {side * model.codec.factor}:
        only = side * model.codec.factor
        raise ConfigError(
            f"the graphs of this model draw {only}x{only} pixels only; other sizes require torch (--runtime)"
        )
    if model.backbone.spec.square and height != width:
        raise ConfigError(f"this model draws squares: give equal sides (got {width}x{height})")
    return check_size("height", height, model.multiple), check_size("width", width, model.multiple)


def strength_of(request: Request, fresh: bool) -> float:
    """The share of the noise that an input picture gets; by default all of it inside a mask."""
    return request.strength if request.strength is not None else 1.0 if fresh else 0.8


def kept_steps(steps: int, strength: float, name: str = "strength") -> int:
    """int(steps * strength), as in SDEdit (Meng et al. 2022). name: of the setting. Raises ConfigError for no step."""
    kept = min(int(steps * strength), steps)
    if strength == 0:
        raise ConfigError(f"{name} must be over 0: with 0 nothing would be drawn")
    if kept < 1:
        raise ConfigError(f"{name} {strength:g} of {steps} steps is less than one step. Raise either")
    return kept


def shortened(levels: tuple[Item, ...], steps: int) -> tuple[Item, ...]:
    """The last levels of a list, for so many steps."""
    return levels[-(steps + 1) :]
