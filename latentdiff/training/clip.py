"""The contrastive stage: pictures and captions of the same scene together, of different scenes apart."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from latentdiff.images import to_images

CaptionedPicture = tuple[np.ndarray, str]


class ClipStage:
    """CLIP's symmetric cross-entropy over batches of distinct scenes."""

    def __init__(
        self,
        module: nn.Module,
        pictures: Callable[[int], list[CaptionedPicture]],
        tokenize: Callable[[list[str]], Tensor],
        contrastive_loss: Callable[..., Tensor],
        device: torch.device,
    ):
        self.module = module
        self._pictures, self._tokenize, self._device = pictures, tokenize, device
        self._contrastive_loss = contrastive_loss

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S) in [-1, 1] and token ids (B, L)."""
        pictures, captions = zip(*self._pictures(index), strict=True)
        return to_images(np.stack(pictures)).to(self._device), self._tokenize(list(captions)).to(self._device)

    def loss(self, module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """In nats; log(B) at chance."""
        return self._contrastive_loss(*module(*batch))
