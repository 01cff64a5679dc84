"""Latents in tokens of 2 x 2, as Black Forest Labs' and Qwen's transformers read them."""

from __future__ import annotations

from torch import Tensor

PATCH = 2  # latents of a token's side


class Packing:
    """The packing as methods; see protocols.PacksLatents."""

    def packed(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, L, 4 C)."""
        return packed(x)

    def unpacked(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """(B, L, 4 C) -> (B, C, h, w)."""
        return unpacked(tokens, height // PATCH, width // PATCH)


def packed(x: Tensor) -> Tensor:
    """(B, C, 2 h, 2 w) -> (B, h w, 4 C): each token holds the 2 x 2 values of each channel."""
    rows, channels, height, width = x.shape
    patches = x.reshape(rows, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(rows, -1, channels * PATCH**2)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, h w, 4 C) -> (B, C, 2 h, 2 w)."""
    patches = tokens.reshape(len(tokens), height, width, -1, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, height * PATCH, width * PATCH)
