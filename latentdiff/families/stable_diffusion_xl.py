"""Stable Diffusion XL: a U-Net that reads sizes, a KL autoencoder, two CLIP text encoders (Podell et al. 2023).

Its refiner has only the second text encoder, and reads an aesthetic score in place of the target size.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from latentdiff.families.stable_diffusion import PARTS_OF_TWO, TASKS, read, save, shared_index
from latentdiff.model import Family, Model

DEFAULTS = {"guidance_scale": 5.0}


def load(directory: Path, variant: str | None) -> Model:
    """See Family."""
    return replace(read(directory, variant, DEFAULTS), family=FAMILY)


def index(model: Model) -> dict[str, Any]:
    """See Family."""
    refines = "text_encoder" not in model.parts
    alone = {"text_encoder": [None, None], "tokenizer": [None, None], "requires_aesthetics_score": True}
    task = "Img2Img" if refines else "Inpaint" if model.inpaints else ""
    return {
        "_class_name": f"StableDiffusionXL{task}Pipeline",
        **shared_index(model),
        **(alone if refines else {}),
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "force_zeros_for_empty_prompt": getattr(model.encoder, "zero_empty", True),
    }


FAMILY = Family(
    "Stable Diffusion XL",
    frozenset(f"StableDiffusionXL{task}" for task in TASKS),
    PARTS_OF_TWO,
    frozenset({"vae", "text_encoder", "tokenizer"}),  # a refiner has only the second ones
    load,
    save,
    index,
    lambda directory: DEFAULTS,
    architecture=lambda model: "stable-diffusion-xl-v1-base",
)
