"""The contrastive stage: embeddings of a picture and its caption together, of different scenes apart."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor, nn

from latentdiff.core.images import to_images

CaptionedPicture = tuple[np.ndarray, str]


class ClipStage:
    """CLIP's symmetric cross-entropy over batches of distinct scenes, which cannot be split."""

    divisible = False

    def __init__(
        self,
        module: nn.Module,
        pictures: Callable[[range], list[CaptionedPicture]],
        tokenize: Callable[[list[str]], Tensor],
        contrastive_loss: Callable[..., Tensor],
    ):
        self.module, self.parts = module, {"clip": module}
        self._pictures, self._tokenize, self._contrastive_loss = pictures, tokenize, contrastive_loss

    def batch(self, positions: range) -> dict[str, Tensor]:
        """Images (B, 3, S, S) in [-1, 1] and token ids (B, L)."""
        pictures, captions = zip(*self._pictures(positions), strict=True)
        return {"images": to_images(np.stack(pictures)), "ids": self._tokenize(list(captions))}

    def loss(self, module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The loss in nats; log(B) at chance."""
        return self._contrastive_loss(*module(batch["images"], batch["ids"]))

    def sample_ids(self, positions: range) -> list[str]:
        """The numbers of pairs of twins, with a for the first and b for the second."""
        return [f"scene {position // 2}{'ab'[position % 2]}" for position in positions]
