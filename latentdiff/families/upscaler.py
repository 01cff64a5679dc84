"""Models that enlarge pictures, in the layout of Stable Diffusion's upscaler.

Beside the latents of the large picture their U-Net reads the small one, slightly noised.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from latentdiff.core.errors import ModelError
from latentdiff.core.files import write_json
from latentdiff.families.scheduler import read_path, scheduler_config
from latentdiff.families.stable_diffusion import PARTS, architecture, read, shared_index
from latentdiff.families.stable_diffusion import save as save_networks
from latentdiff.formats.folder import picture_geometry, read_json
from latentdiff.model import Enlarging, Family, Model

PIPELINE = "StableDiffusionUpscalePipeline"
DEFAULTS = {"num_inference_steps": 75, "guidance_scale": 9.0}
SCHEDULER = "low_res_scheduler/scheduler_config.json"
LARGEST_SCALE = 64
TIMES = 350  # diffusers' default: the small picture's noise is below this time


def enlarging(directory: Path) -> Enlarging:
    """See Family. Raises ModelError.

    Only models trained here have a `scale` in the index; without it the latents are as large as the small picture.
    """
    index, path = read_json(directory / "model_index.json"), read_path(directory / SCHEDULER)
    most, scale = index.get("max_noise_level", TIMES), index.get("scale", picture_geometry(directory)[0])
    if type(scale) is not int or not 1 <= scale <= LARGEST_SCALE:
        raise ModelError(f"scale must be from 1 to {LARGEST_SCALE} (got {str(scale)[:40]} in {directory})")
    if type(most) is not int or not 0 <= most < path.T:
        raise ModelError(f"max_noise_level must be from 0 to {path.T - 1} (got {str(most)[:40]} in {directory})")
    return Enlarging(scale, path, most + 1, usual=min(20, most))


def load(directory: Path, variant: str | None) -> Model:
    """See Family."""
    return replace(read(directory, variant, DEFAULTS, enlarging(directory)), family=FAMILY)


def save(model: Model, directory: Path) -> None:
    """See Family."""
    save_networks(model, directory)
    assert model.enlarging is not None
    (directory / SCHEDULER).parent.mkdir()
    write_json(directory / SCHEDULER, scheduler_config(model.enlarging.path, "epsilon", "leading"))


def index(model: Model) -> dict[str, Any]:
    """See Family."""
    assert model.enlarging is not None
    return {
        "_class_name": PIPELINE,
        **{name: entry for name, entry in shared_index(model).items() if name != "image_encoder"},
        "low_res_scheduler": ["diffusers", "DDPMScheduler"],
        "safety_checker": [None, None],
        "watermarker": [None, None],
        "max_noise_level": model.enlarging.times - 1,
        "scale": model.enlarging.scale,
    }


FAMILY = Family(
    "Stable Diffusion upscaler",
    frozenset({PIPELINE}),
    PARTS,
    frozenset({"vae"}),
    load,
    save,
    index,
    lambda directory: DEFAULTS,
    architecture=architecture,
    enlarging=enlarging,
)
