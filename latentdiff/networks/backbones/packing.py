"""Latents in tokens of 2 x 2, as Black Forest Labs' and Qwen's transformers read them."""

from __future__ import annotations

from latentdiff.core.arrays import Array, library

PATCH = 2  # latents of a token's side


class Packing:
    """The packing as methods; see protocols.PacksLatents."""

    def packed(self, x: Array) -> Array:
        """(B, C, h, w) -> (B, L, 4 C)."""
        return packed(x)

    def unpacked(self, tokens: Array, height: int, width: int) -> Array:
        """(B, L, 4 C) -> (B, C, h, w)."""
        return unpacked(tokens, height // PATCH, width // PATCH)


def packed(x: Array) -> Array:
    """(B, C, 2 h, 2 w) -> (B, h w, 4 C): each token holds the 2 x 2 values of each channel."""
    rows, channels, height, width = x.shape
    patches = x.reshape(rows, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return library(x).moveaxis(patches, (2, 4), (1, 2)).reshape(rows, -1, channels * PATCH**2)


def unpacked(tokens: Array, height: int, width: int) -> Array:
    """(B, h w, 4 C) -> (B, C, 2 h, 2 w)."""
    patches = tokens.reshape(tokens.shape[0], height, width, -1, PATCH, PATCH)
    places = library(tokens).moveaxis(patches, (3, 4), (1, 3))
    return places.reshape(tokens.shape[0], -1, height * PATCH, width * PATCH)
