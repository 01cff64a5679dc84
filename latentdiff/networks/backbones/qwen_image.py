"""The transformer of Qwen-Image (Alibaba 2025): diffusers.QwenImageTransformer2DModel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.networks.backbones.packing import PATCH, Packing, packed, unpacked
from latentdiff.networks.backbones.transformer import Transformer
from latentdiff.networks.conditions import Conditions
from latentdiff.networks.protocols import Spec


class QwenImage(Packing, Transformer):
    """It reads `tokens` (B, L, D) of the prompt, those that `mask` (B, L) marks if there is one."""

    masked = True

    @property
    def spec(self) -> Spec:
        """See Spec."""
        config = self.model.config
        reads = {"tokens": (None, int(config.joint_attention_dim))}
        return Spec(int(config.in_channels) // PATCH**2, int(config.out_channels), PATCH, reads)

    def output(self, x: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """See Transformer. Tokens after the longest prompt are left out."""
        tokens, mask = conditions["tokens"], conditions.get("mask")
        if mask is not None:
            longest = int(mask.sum(1).max())
            tokens, mask = tokens[:, :longest], mask[:, :longest].long()
        return self._output(x, time, tokens, mask)

    def _output(self, x: Tensor, time: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        height, width = x.shape[-2] // PATCH, x.shape[-1] // PATCH
        output: Tensor = self.model(
            hidden_states=packed(x),
            timestep=(time / 1000).to(x.dtype),
            encoder_hidden_states=tokens,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, height, width)]] * len(x),
            return_dict=False,
        )[0]
        unpacked_: Tensor = unpacked(output, height, width)
        return unpacked_

    def _function(self, x: Tensor, time: Tensor, **arrays: Tensor) -> Tensor:
        """See Transformer. The library computes rotations from Python numbers, which a trace freezes."""
        own = self.model.pos_embed
        self.model.pos_embed = _Rotations(own)
        try:
            return self._output(x, time.expand(x.shape[0]), arrays["tokens"], arrays["mask"].long())
        finally:
            self.model.pos_embed = own


class _Rotations(nn.Module):
    """QwenEmbedRope for sizes that a tracer follows: rotations (L, D / 2) of the picture's tokens and the text's.

    Rows and columns count from the middle; the text's places go on after the larger of them.
    """

    def __init__(self, own: Any):
        super().__init__()
        self.first = len(own.neg_freqs)  # the row of place 0
        self.table = torch.view_as_real(torch.cat([own.neg_freqs, own.pos_freqs]))
        self.axes = [each // 2 for each in own.axes_dim]

    def forward(self, sizes: Any, max_txt_seq_len: Any, device: Any = None) -> tuple[Tensor, Tensor]:
        _, height, width = sizes[0][0]
        rows = torch.arange(height) - (height - height // 2)
        columns = torch.arange(width) - (width - width // 2)
        axes = [torch.zeros_like(rows[:1]), rows, columns]
        grid = torch.meshgrid(*axes, indexing="ij")
        tables = torch.split(self.table, self.axes, 1)
        picture = torch.cat([table[each.flatten() + self.first] for table, each in zip(tables, grid, strict=True)], 1)
        begin = torch.maximum(torch.as_tensor(height // 2), torch.as_tensor(width // 2))
        text = self.table[torch.arange(max_txt_seq_len) + begin + self.first]
        return torch.view_as_complex(picture), torch.view_as_complex(text)
