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


class _Recorded:
    """Attention as two products and a softmax, whose result is kept: (B, HW, L), the mean over heads."""

    def __init__(self, maps: list[Tensor]):
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
        self._maps.append(scores.detach().float().unflatten(0, (-1, attention.heads)).mean(1))
        drawn = attention.batch_to_head_dim(torch.bmm(scores, value))
        return attention.to_out[1](attention.to_out[0](drawn)) / attention.rescale_output_factor


@contextmanager
def recorded_attention(unet: UNet) -> Iterator[list[Tensor]]:
    """A block in which every cross-attention appends its map (B, HW, L) to the list; outputs change by rounding."""
    maps: list[Tensor] = []
    before = {name: module.processor for name, module in unet.cross_attentions()}
    try:
        for _, module in unet.cross_attentions():
            module.set_processor(_Recorded(maps))
        yield maps
    finally:
        for name, module in unet.cross_attentions():
            module.set_processor(before[name])


def mean_map(maps: list[Tensor], height: int, width: int) -> Tensor:
    """The mean (L, height, width) of maps of several levels in their last row, which is the prompt's, enlarged.

    height, width: of the latents.
    """
    total = torch.zeros(maps[0].shape[-1], height, width)
    for each in maps:
        level = next(k for k in range(16) if math.ceil(height / 2**k) * math.ceil(width / 2**k) == each.shape[1])
        sides = math.ceil(height / 2**level), math.ceil(width / 2**level)
        square = each[-1].T.reshape(-1, *sides).cpu()
        total += functional.interpolate(square[None], (height, width), mode="bilinear")[0]
    return total / len(maps)
