"""Families of models: their parts, and how a model is read from a folder and written to one.

A family is one file in this folder and one entry of FAMILIES. This module does not import torch: OpenVINO's models are
checked and described without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentdiff.core.errors import ModelError, UnsafeError
from latentdiff.families import (
    dit,
    flux,
    flux_2,
    own,
    qwen_image,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
    upscaler,
    z_image,
)
from latentdiff.formats import folder
from latentdiff.model import Family

_MODULES = (
    own,
    stable_diffusion,
    stable_diffusion_xl,
    upscaler,
    dit,
    stable_diffusion_3,
    flux,
    flux_2,
    z_image,
    qwen_image,
)
FAMILIES: tuple[Family, ...] = tuple(module.FAMILY for module in _MODULES)


def check_folder(directory: Path) -> tuple[Family, dict[str, Any]]:
    """Check a model folder without building a network; return its family and its model_index.

    Raises ModelError, UnsafeError.
    """
    index = folder.read_index(directory)
    family = family_of(index, directory)
    folder.check_index(index, directory, family.parts, family.optional)
    return family, index


def family_of(index: dict[str, Any], directory: Path) -> Family:
    """The family of the pipeline class in the index; models trained here are recognised by their files."""
    where, name = f"{directory}/model_index.json", index.get("_class_name", "StableDiffusionPipeline")
    if not isinstance(name, str):
        raise UnsafeError(f"model directory asks to run code (_class_name {name}, {where}). latentdiff never does this")
    for family in FAMILIES:
        if name in family.pipelines and (family is not own.FAMILY or own.is_own(directory)):
            return family
    known = ", ".join(family.name for family in FAMILIES if family is not own.FAMILY)
    raise ModelError(f"{name} is not supported ({where}). Supported: {known}")


def check_vae(path: Path) -> Path:
    """Check a folder of a VAE, or the VAE of a model folder; return its folder. Raises ModelError, UnsafeError."""
    return folder.check_network(path, "vae", frozenset().union(*(family.parts["vae"] for family in FAMILIES)))
