"""Cross-attention maps of a U-Net: how much each place attends to each token (DAAM, Tang et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.nn import functional

from latentdiff.networks.backbones.unet import UNet


class AttentionMaps:
    """Sums of maps (HW, L) by their size, so that memory does not grow with steps and layers."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self._count = 0

    def add(self, scores: Tensor) -> None:
        """Add one map (HW, L)."""
        size = scores.shape[0]
        self._sums[size] = self._sums[size] + scores if size in self._sums else scores
        self._count += 1

    def mean(self, height: int, width: int) -> Tensor:
        """The mean of all maps, (L, height, width), those of deeper levels enlarged. height, width: of the latents."""
        return (
            torch.stack([_enlarged(total.cpu(), height, width) for total in self._sums.values()]).sum(0) / self._count
        )


def _enlarged(scores: Tensor, height: int, width: int) -> Tensor:
    """A map (HW, L) of one level as (L, height, width)."""
    levels = ((math.ceil(height / 2**k), math.ceil(width / 2**k)) for k in range(16))
    sides = next(sides for sides in levels if math.prod(sides) == scores.shape[0])
    return functional.interpolate(scores.T.reshape(1, -1, *sides), (height, width), mode="bilinear")[0]


class _Recorded:
    """Attention as two products and a softmax, whose last row, the prompt's, is added to the maps."""

    def __init__(self, maps: AttentionMaps):
        self._maps = maps

    def __call__(
        self, attention: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any
    ) -> Tensor:
        query, key, value = (
            attention.head_to_batch_dim(projected)
            for projected in (
                attention.to_q(hidden_states),
                attention.to_k(encoder_hidden_states),
                attention.to_v(encoder_hidden_states),
            )
        )
        scores = attention.get_attention_scores(query, key)
        self._maps.add(scores.detach()[-attention.heads :].float().mean(0))
        hidden = attention.batch_to_head_dim(torch.bmm(scores, value))
        return attention.to_out[1](attention.to_out[0](hidden)) / attention.rescale_output_factor


@contextmanager
def recorded_attention(unet: UNet) -> Iterator[AttentionMaps]:
    """A block in which every cross-attention adds its map of the last condition; outputs change by rounding."""
    maps = AttentionMaps()
    before = {name: module.processor for name, module in unet.cross_attentions()}
    try:
        for _, module in unet.cross_attentions():
            module.set_processor(_Recorded(maps))
        yield maps
    finally:
        for name, module in unet.cross_attentions():
            module.set_processor(before[name])
