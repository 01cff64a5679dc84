"""What a U-Net is told beside the noisy latents and the time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Context:
    """The text of B pictures; under K conditions at once every tensor has K in front.

    tokens: (B, L, D), for cross-attention. Of SDXL alone: pooled (B, P), one vector a text, and sizes (B, 6) in pixels,
    the original (height, width), the crop's (top, left) and the target (height, width).
    """

    tokens: Tensor
    pooled: Tensor | None = None
    sizes: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> Context:
        """The same elsewhere; sizes keep their float32, in which 1024 is itself."""
        pooled = None if self.pooled is None else self.pooled.to(device, dtype)
        sizes = None if self.sizes is None else self.sizes.to(device)
        return Context(self.tokens.to(device, dtype), pooled, sizes)

    def flattened(self) -> Context:
        """K conditions of B pictures as K B pictures."""
        flat = [None if tensor is None else tensor.flatten(0, 1) for tensor in (self.pooled, self.sizes)]
        return Context(self.tokens.flatten(0, 1), *flat)

    def zeros(self) -> Context:
        """What says nothing to a model that was trained with zeros for it."""
        pooled = None if self.pooled is None else torch.zeros_like(self.pooled)
        return Context(torch.zeros_like(self.tokens), pooled, self.sizes)


def stacked(contexts: Sequence[Context]) -> Context:
    """One more dimension in front: pictures of a batch, or conditions of a picture."""

    def stack(tensors: list[Tensor | None]) -> Tensor | None:
        known = [tensor for tensor in tensors if tensor is not None]
        return torch.stack(known) if known else None

    tokens = torch.stack([context.tokens for context in contexts])
    return Context(tokens, stack([c.pooled for c in contexts]), stack([c.sizes for c in contexts]))
