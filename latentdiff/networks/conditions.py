"""What a U-Net is told beside the noisy latents and the time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from latentdiff.core.arrays import Array, library

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Context:
    """The text of B pictures, in NumPy arrays or torch tensors; under K conditions at once all have K in front.

    tokens: (B, L, D), for cross-attention. Of SDXL alone: pooled (B, P), one vector a text, and sizes (B, 6) in pixels,
    the original (height, width), the crop's (top, left) and the target (height, width). text: what a U-Net has made of
    the tokens for each of its attentions, where it does so ahead.
    """

    tokens: Array
    pooled: Array | None = None
    sizes: Array | None = None
    text: Any = None

    def mapped(self, change: Callable[[Array], Array]) -> Context:
        """The same with every array changed."""
        return self._mapped(change, change)

    def to(self, device: torch.device) -> Context:
        """The same elsewhere."""
        return self.mapped(lambda tensor: tensor.to(device))

    def cast(self, dtype: torch.dtype) -> Context:
        """The same in another precision; sizes keep their float32, in which 1023 is itself."""
        return self._mapped(lambda tensor: tensor.to(dtype), lambda sizes: sizes)

    def flattened(self) -> Context:
        """K conditions of B pictures as K B pictures."""
        return self.mapped(lambda array: array.reshape(-1, *array.shape[2:]))

    def zeros(self) -> Context:
        """What says nothing to a model that was trained with zeros for it."""
        return self._mapped(lambda array: library(array).zeros_like(array), lambda sizes: sizes)

    def _mapped(self, of_text: Callable[[Array], Array], of_sizes: Callable[[Array], Array]) -> Context:
        pooled = None if self.pooled is None else of_text(self.pooled)
        return replace(
            self,
            tokens=of_text(self.tokens),
            pooled=pooled,
            sizes=None if self.sizes is None else of_sizes(self.sizes),
        )


class Words(NamedTuple):
    """What becomes a Context once a text encoder has read it: token ids (B, L), of two (B, 2, L), and sizes (B, 6)."""

    ids: Tensor
    sizes: Tensor | None = None


def stacked(contexts: Sequence[Context]) -> Context:
    """One more dimension in front: pictures of a batch, or conditions of a picture."""

    def stack(arrays: list[Array | None]) -> Array | None:
        known = [array for array in arrays if array is not None]
        return library(known[0]).stack(known) if known else None

    tokens = stack([context.tokens for context in contexts])
    return Context(tokens, stack([c.pooled for c in contexts]), stack([c.sizes for c in contexts]))


def side_by_side(first: Context, second: Context) -> Context:
    """What SDXL's two text encoders say, (L, D1 + D2); the pooled text is the second's."""
    tokens = library(first.tokens).concatenate([first.tokens, second.tokens], -1)
    return Context(tokens, second.pooled)
