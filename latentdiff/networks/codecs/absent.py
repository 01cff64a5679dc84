"""The codec of a checkpoint without a VAE: it knows the shapes, and asks for a VAE when it is used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import nn

from latentdiff.core.errors import ModelError


class AbsentCodec(nn.Module):
    """A Codec of Stable Diffusion's shapes without weights. scale: of the latents, for the VAE that takes its place."""

    factor, latent_channels, image_channels, shift = 8, 4, 3, 0.0

    def __init__(self, scale: float):
        super().__init__()
        self.scale, self.dtype = scale, torch.float32

    def shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """See Codec."""
        return self.latent_channels, size[0] // self.factor, size[1] // self.factor

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """See Codec."""
        yield

    @contextmanager
    def piecewise(self, *, tiles: bool, slices: bool) -> Iterator[None]:
        """See Codec."""
        yield

    def latents_of(self, images: Any) -> NoReturn:
        """Raise ModelError."""
        raise ModelError("this checkpoint has no VAE. Name one: --vae, load_vae")

    images_of = save = latents_of
