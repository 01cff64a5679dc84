"""Pictures to latents and back by a model's codec, in float32 if its own precision overflows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from latentdiff.core.arrays import Array, library, to_numpy
from latentdiff.core.images import luminance, to_uint8, to_values
from latentdiff.model import Model

if TYPE_CHECKING:
    import torch

Notes = list[str]


def as_images(model: Model, pictures: np.ndarray) -> Array:
    """uint8 (B, H, W, 3) -> (B, C, H, W) in [-1, 1] for the codec, on its device."""
    return model.array(to_values(luminance(pictures) if model.codec.image_channels == 1 else pictures))


def encode(model: Model, pictures: np.ndarray, notes: Notes | None = None) -> Array:
    """uint8 (B, H, W, 3) -> latents (B, C, h, w), each picture by itself."""
    rows = [encode_images(model, as_images(model, picture[None]), notes) for picture in pictures]
    return library(rows[0]).concatenate(rows)


def encode_images(model: Model, images: Array, notes: Notes | None = None) -> Array:
    """Images (B, C, H, W) in [-1, 1] -> latents, float32."""
    return _computed(model, lambda: model.codec.latents_of(images), "encoded", notes)


def decode(model: Model, latents: Array, notes: Notes | None = None) -> Array:
    """Latents (B, C, h, w) -> images (B, 3, H, W) in [-1, 1], float32."""
    return _computed(model, lambda: model.codec.images_of(latents), "decoded", notes).clip(-1, 1)


def _computed(model: Model, compute: Callable[[], Array], what: str, notes: Notes | None) -> Array:
    """The codec's result in its own precision, or if that is not finite, in float32 with a note."""
    precision = str(model.codec.dtype).removeprefix("torch.")
    result = compute()
    if precision == "float32" or all_finite(result):
        return result
    with model.codec.in_float32():
        result = compute()
    if notes is not None and all_finite(result):
        note = f"the autoencoder gave non-finite numbers in {precision}; {what} in float32 instead"
        if note not in notes:
            notes.append(note)
    return result


def reconstruct(model: Model, pictures: np.ndarray) -> np.ndarray:
    """uint8 (B, H, W, 3) encoded to the mean of their latents and decoded again, uint8 (B, H, W, C)."""
    return to_uint8(decode(model, encode_images(model, as_images(model, pictures))))


def differentiable_decode(model: Model, latents: torch.Tensor) -> torch.Tensor:
    """Latents -> images about in [-1, 1], float32, in the codec's precision, for gradients."""
    codec = model.codec
    return codec.decode(latents.to(codec.dtype)).float()  # type: ignore[attr-defined]


def are_flat(images: Array) -> np.ndarray:
    """Whether each of the images (B, C, H, W) has one colour only, to a step of 255; bool (B,)."""
    values = to_numpy(images).reshape(*images.shape[:2], -1)
    return np.asarray((values.max(-1) - values.min(-1) <= 2 / 255).all(-1))


def all_finite(array: Array) -> bool:
    """Whether every value is a finite number."""
    return bool(library(array).isfinite(array).all())
