"""Latents as callers see them: in the layout of diffusers' pipeline of the same model."""

from __future__ import annotations

from typing import Any

from latentdiff.core.arrays import Array
from latentdiff.model import Model
from latentdiff.networks.protocols import PacksLatents, ShowsLatents


def final_to_diffusers(model: Model, latents: Array) -> Array:
    """Final latents (B, C, h, w) as diffusers' pipeline returns them: those of some models are tokens, (B, L, D)."""
    return model.codec.to_diffusers(latents) if isinstance(model.codec, ShowsLatents) else to_diffusers(model, latents)


def to_diffusers(model: Model, latents: Array) -> Array:
    """Latents (B, C, h, w) as diffusers' pipeline has them between its steps."""
    return model.backbone.packed(latents) if isinstance(model.backbone, PacksLatents) else latents


def from_diffusers(model: Model, latents: Any, shape: tuple[int, ...]) -> Any:
    """A caller's latents as `shape`, (B, C, h, w), unpacked from diffusers' layout; others are returned unchanged."""
    backbone = model.backbone
    if not isinstance(backbone, PacksLatents) or getattr(latents, "ndim", 0) != 3:
        return latents
    height, width = shape[-2:]
    channels = shape[1] * backbone.spec.multiple**2
    fits = tuple(latents.shape) == (shape[0], height * width // backbone.spec.multiple**2, channels)
    return backbone.unpacked(latents, height, width) if fits else latents
