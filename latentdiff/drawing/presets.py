"""Presets: what distilled models and adapters are drawn with, by the names that people know.

A preset stands between the model's recommended settings and the user's: any setting that is given beside it wins.

    lcm         latent consistency models and LCM-LoRA        999, 759, 499, 259 of 1,000 times    Luo et al. 2023
    turbo       SDXL-Turbo and SD-Turbo                       999, or 999, 749, 499, 249           Sauer et al. 2023
    lightning   SDXL-Lightning                                999, 749, 499, 249                   Lin et al. 2024
    hyper       Hyper-SD                                      999, 749, 499, 249                   Ren et al. 2024
    tcd         trajectory consistency distillation           999, 759, 499, 259                   Zheng et al. 2024
    dmd2        distribution matching distillation            999, 749, 499, 249                   Yin et al. 2024
    mean-flow   mean flows, on straight paths                 1000, 750, 500, 250                  Geng et al. 2025
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latentdiff.core.errors import ConfigError
from latentdiff.diffusion.grids import LABELS
from latentdiff.diffusion.samplers import SAMPLERS
from latentdiff.model import Model
from latentdiff.settings.validation import plain_name


def _few(sampler: str, spacing: str = "trailing", steps: int = 4) -> dict[str, Any]:
    """The settings of a distilled model. Its guidance is inside the network: none is added."""
    return {"sampler": sampler, "spacing": spacing, "num_inference_steps": steps, "guidance_scale": 1.0}


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "lcm": _few("lcm", "distilled"),
    "turbo": _few("euler_ancestral", steps=1),
    "lightning": _few("euler"),
    "hyper": _few("ddim"),
    "tcd": _few("tcd", "distilled"),
    "dmd2": _few("lcm"),
    "mean-flow": _few("euler"),
}


def settled(
    defaults: Mapping[str, Any], settings: Mapping[str, Any], *, reads_guidance: bool = False
) -> dict[str, Any]:
    """The settings of a picture: the model's defaults, then those of the preset, then `settings`.

    A list of timesteps or sigmas replaces a recommended number of steps. reads_guidance: whether the network reads
    guidance_scale. Then a preset does not set it: 1 would not turn guidance off, but draw another picture.

    Raises ConfigError for an unknown preset, and for a spacing beside a sampler's name that states another.
    """
    settings = _without_a1111_names(settings)
    below = {**defaults, **_preset(settings.pop("preset", None), reads_guidance=reads_guidance)}
    if settings.get("timesteps") is not None or settings.get("sigmas") is not None:
        below.pop("num_inference_steps", None)
    return {**below, **settings}


def _preset(name: Any, *, reads_guidance: bool) -> dict[str, Any]:
    """The settings of a preset; none without a name. Raises ConfigError."""
    if name is None:
        return {}
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(f"unknown preset {str(name)[:40]!r}; one of {', '.join(PRESETS)}")
    return {key: value for key, value in PRESETS[name].items() if not (reads_guidance and key == "guidance_scale")}


def _without_a1111_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, with sampler and spacing in place of A1111's name of both, like `DPM++ 2M Karras`.

    Raises ConfigError if they have another spacing too.
    """
    name = settings.get("sampler")
    if not isinstance(name, str) or name in SAMPLERS:
        return dict(settings)
    for sampler, row in SAMPLERS.items():
        rest = name.lower().removeprefix(row.label.lower()).strip()
        grids = [grid for grid, label in LABELS.items() if label.lower() == rest]
        if name.lower().startswith(row.label.lower()) and (not rest or grids):
            spacing = settings.get("spacing")
            own = plain_name(spacing) if isinstance(spacing, str) else spacing
            if grids and own not in (None, *grids):
                raise ConfigError(f"sampler {name!r} has the spacing {grids[0]}: leave out spacing (got {spacing!r})")
            return {**settings, "sampler": sampler, **({"spacing": own or grids[0]} if grids else {})}
    return dict(settings)


def settled_for(model: Model, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a picture by this model; see `settled`."""
    return settled(model.card.defaults, settings, reads_guidance=model.reads_guidance)
