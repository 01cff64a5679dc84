"""The transformer of Flux.1 (Black Forest Labs 2024): diffusers.FluxTransformer2DModel.

It reads latents in tokens of 2 x 2, each with its row and column, after the tokens of the prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latentdiff.networks.backbones.packing import PATCH, packed, unpacked
from latentdiff.networks.backbones.transformer import Transformer
from latentdiff.networks.conditions import Conditions
from latentdiff.networks.protocols import Spec


class Flux(Transformer):
    """It reads `tokens` (B, L, D) and `pooled` (B, P) of the prompt, and `guidance` (B,) if that is embedded."""

    @property
    def spec(self) -> Spec:
        """See Spec."""
        config = self.model.config
        reads = self.texts
        if config.guidance_embeds:
            reads["guidance"] = ()
        outputs = int(config.out_channels or config.in_channels)
        return Spec(int(config.in_channels) // PATCH**2, outputs // PATCH**2, PATCH, reads)

    def output(self, x: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """See Transformer."""
        height, width = x.shape[-2] // PATCH, x.shape[-1] // PATCH
        tokens = conditions["tokens"]
        output = self.model(
            hidden_states=packed(x),
            timestep=(time / 1000).to(x.dtype),
            guidance=conditions.get("guidance"),
            encoder_hidden_states=tokens,
            pooled_projections=conditions["pooled"],
            txt_ids=torch.zeros(tokens.shape[1], 3, device=x.device, dtype=x.dtype),
            img_ids=places(height, width).to(x),
            return_dict=False,
        )[0]
        return unpacked(output, height, width)


def places(height: int, width: int) -> Tensor:
    """The place of each token, (h w, 3): 0, row, column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3)
