"""What a U-Net is told beside the noisy latents and the time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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

    def to(self, device: torch.device) -> Context:
        """The same elsewhere."""
        return self._mapped(lambda tensor: tensor.to(device), lambda sizes: sizes.to(device))

    def cast(self, dtype: torch.dtype) -> Context:
        """The same in another precision; sizes keep their float32, in which 1023 is itself."""
        return self._mapped(lambda tensor: tensor.to(dtype), lambda sizes: sizes)

    def flattened(self) -> Context:
        """K conditions of B pictures as K B pictures."""
        return self._mapped(lambda tensor: tensor.flatten(0, 1), lambda sizes: sizes.flatten(0, 1))

    def zeros(self) -> Context:
        """What says nothing to a model that was trained with zeros for it."""
        return self._mapped(torch.zeros_like, lambda sizes: sizes)

    def _mapped(self, of_text: Callable[[Tensor], Tensor], of_sizes: Callable[[Tensor], Tensor]) -> Context:
        pooled = None if self.pooled is None else of_text(self.pooled)
        return Context(of_text(self.tokens), pooled, None if self.sizes is None else of_sizes(self.sizes))


class Words(NamedTuple):
    """What becomes a Context once a text encoder has read it: token ids (B, L), of two (B, 2, L), and sizes (B, 6)."""

    ids: Tensor
    sizes: Tensor | None = None


def stacked(contexts: Sequence[Context]) -> Context:
    """One more dimension in front: pictures of a batch, or conditions of a picture."""

    def stack(tensors: list[Tensor | None]) -> Tensor | None:
        known = [tensor for tensor in tensors if tensor is not None]
        return torch.stack(known) if known else None

    tokens = torch.stack([context.tokens for context in contexts])
    return Context(tokens, stack([c.pooled for c in contexts]), stack([c.sizes for c in contexts]))
