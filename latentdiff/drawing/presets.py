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
from latentdiff.model import Model


def _few(sampler: str, spacing: str = "trailing", steps: int = 4) -> dict[str, Any]:
    """A distilled model has its guidance inside: any more is too much."""
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

    reads_guidance: whether the network does. Then a preset leaves it as the model recommends: 1 would be another
    picture, not the absence of guidance.

    Raises ConfigError for an unknown preset.
    """
    name = settings.get("preset")
    if name is None:
        return {key: value for key, value in {**defaults, **settings}.items() if key != "preset"}
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(f"unknown preset {str(name)[:40]!r}; one of {', '.join(PRESETS)}")
    preset = {key: value for key, value in PRESETS[name].items() if not (reads_guidance and key == "guidance_scale")}
    return {**defaults, **preset, **{key: value for key, value in settings.items() if key != "preset"}}


def settled_for(model: Model, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a picture by this model; see `settled`."""
    return settled(model.card.defaults, settings, reads_guidance=model.reads_guidance)
