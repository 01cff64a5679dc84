"""The transformer of Z-Image (Alibaba 2025): diffusers.ZImageTransformer2DModel, in which one stream holds the tokens
of the picture and of the prompt.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentdiff.networks.backbones.transformer import Transformer
from latentdiff.networks.conditions import Conditions
from latentdiff.networks.protocols import Spec


class ZImage(Transformer):
    """It reads `tokens` (B, L, D) of the prompt, those that `mask` (B, L) marks if there is one."""

    @property
    def spec(self) -> Spec:
        """See Spec."""
        config = self.model.config
        channels = int(config.in_channels)
        reads = {"tokens": (None, int(config.cap_feat_dim))}
        return Spec(channels, channels, int(config.all_patch_size[0]), reads)

    def output(self, x: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """See Transformer. The module's time runs from 0, noise, to 1, and it predicts x0 - noise."""
        output: list[Tensor] = self.model(
            list(x.unsqueeze(2)), 1 - time / 1000, _marked(conditions), return_dict=False
        )[0]
        return -torch.stack(output).squeeze(2)


def _marked(conditions: Conditions) -> list[Any]:
    """The tokens of each prompt, (L', D)."""
    mask, tokens = conditions.get("mask"), list(conditions["tokens"])
    return tokens if mask is None else [rows[marks.bool()] for rows, marks in zip(tokens, mask, strict=True)]
