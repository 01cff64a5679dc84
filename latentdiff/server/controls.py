"""Controls in A1111's API, as its ControlNet extension has them: units of a picture, a module that annotates it, and a
model.

https://github.com/Mikubill/sd-webui-controlnet/wiki/API. A unit's model is the name of a ControlNet in the folder that
the server was started with; its module is "none" or one of our annotators.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from latentdiff.core.annotators import ANNOTATORS
from latentdiff.core.errors import ConfigError
from latentdiff.drawing.hints import Hint, hints_of
from latentdiff.server.studio import Studio, from_base64, read_picture
from latentdiff.settings.validation import first_fault

SCRIPT = "controlnet"
_NONE = ("none", "none (raw)", "")
_MODES = ("balanced", "0", "")
_MOST = 8
Share = Annotated[float, Field(ge=0, le=1)]


class Unit(BaseModel):
    """A unit, as far as it is read. `input_image` is the older name of `image`."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    enabled: bool = True
    image: str | dict[str, Any] | None = None
    input_image: str | None = None
    module: str = "none"
    model: str = "None"
    weight: Annotated[float, Field(ge=-10, le=10)] = 1.0
    guidance_start: Share = 0.0
    guidance_end: Share = 1.0
    control_mode: str | int = "Balanced"
    mask: str | None = None
    guessmode: bool = False


class Controls(NamedTuple):
    """What units ask for: the names of the ControlNets, their hints, settings of drawing; and what is not read."""

    names: tuple[str, ...] = ()
    hints: tuple[Hint, ...] = ()
    settings: Mapping[str, Any] = {}
    unread: tuple[str, ...] = ()


def controls_of(scripts: Any) -> Controls:
    """The controls among A1111's `alwayson_scripts`. Raises ConfigError for others, and for what is not supported."""
    if not scripts:
        return Controls()
    if not isinstance(scripts, Mapping):
        raise ConfigError("alwayson_scripts must be an object")
    units: list[Unit] = []
    for name, script in scripts.items():
        args = script.get("args") if isinstance(script, Mapping) else None
        if not args and name.lower() == SCRIPT:
            continue
        if name.lower() != SCRIPT or not isinstance(args, list):
            raise ConfigError(f"alwayson_scripts is not supported: {str(name)[:40]}")
        units += [_unit(each) for each in args]
    units = [unit for unit in units if unit.enabled and unit.model not in ("None", "")]
    if len(units) > _MOST:
        raise ConfigError(f"a picture has at most {_MOST} controls (got {len(units)})")
    if not units:
        return Controls()
    settings = {
        "controlnet_conditioning_scale": tuple(unit.weight for unit in units),
        "control_guidance_start": tuple(unit.guidance_start for unit in units),
        "control_guidance_end": tuple(unit.guidance_end for unit in units),
    }
    unread = sorted({f"{SCRIPT}.{name}" for unit in units for name, value in (unit.model_extra or {}).items() if value})
    return Controls(tuple(_name(unit.model) for unit in units), tuple(map(_hint, units)), settings, tuple(unread))


def _unit(tree: Any) -> Unit:
    try:
        return Unit.model_validate(tree)
    except ValidationError as error:
        fault = first_fault(error)
        raise ConfigError(f"controlnet: {'.'.join(fault.path)[:60]}: {fault.message[:100]}") from None


def _name(model: str) -> str:
    """A model's name without the hash that clients append, `canny [d14c016b]`."""
    return model.partition(" [")[0]


def _hint(unit: Unit) -> Hint:
    """The hint of a unit. Raises ConfigError."""
    if str(unit.control_mode).lower() not in _MODES:
        raise ConfigError(f"controlnet: control_mode {str(unit.control_mode)[:40]!r} is not supported; use Balanced")
    if unit.mask or unit.guessmode:
        raise ConfigError(f"controlnet: {'mask' if unit.mask else 'guessmode'} is not supported")
    image = unit.image.get("image") if isinstance(unit.image, dict) else unit.image
    coded = image or unit.input_image
    if not isinstance(coded, str) or not coded:
        raise ConfigError("controlnet: a unit requires an image")
    module = unit.module.lower()
    if module not in (*_NONE, *ANNOTATORS):
        known = ", ".join(ANNOTATORS)
        raise ConfigError(f"controlnet: unknown module {unit.module[:40]!r}; none or one of {known}")
    pixels = read_picture(from_base64(coded), "controlnet.image")
    (hint,) = hints_of(pixels, 1, annotated=None if module in _NONE else module)
    return hint


def routes(studio: Studio) -> APIRouter:
    """The routes under /controlnet."""
    router = APIRouter(prefix="/controlnet")

    @router.get("/version")
    def version() -> dict[str, Any]:
        return {"version": 2}

    @router.get("/model_list")
    def models() -> dict[str, Any]:
        return {"model_list": studio.shelf.controls()}

    @router.get("/module_list")
    def modules() -> dict[str, Any]:
        return {"module_list": ["none", *ANNOTATORS]}

    return router
