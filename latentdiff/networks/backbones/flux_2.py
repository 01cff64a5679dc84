"""The transformer of FLUX.2 (Black Forest Labs 2025): diffusers.Flux2Transformer2DModel.

Each of its latents is a token with four coordinates: the picture's number, row, column, and the place in the prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latentdiff.networks.backbones.transformer import Transformer
from latentdiff.networks.conditions import Conditions
from latentdiff.networks.protocols import Spec


class Flux2(Transformer):
    """It reads `tokens` (B, L, D) of the prompt, and `guidance` (B,) if that is embedded."""

    @property
    def spec(self) -> Spec:
        """See Spec."""
        config = self.model.config
        reads: dict[str, tuple[int | None, ...]] = {"tokens": (None, int(config.joint_attention_dim))}
        if config.guidance_embeds:
            reads["guidance"] = ()
        return Spec(int(config.in_channels), int(config.out_channels or config.in_channels), 1, reads)

    def output(self, x: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """See Transformer."""
        height, width = x.shape[-2:]
        tokens = conditions["tokens"]
        output: Tensor = self.model(
            hidden_states=x.flatten(2).transpose(1, 2),
            timestep=(time / 1000).to(x.dtype),
            guidance=conditions.get("guidance"),
            encoder_hidden_states=tokens,
            txt_ids=_grid(1, 1, tokens.shape[1]).to(x.device).expand(x.shape[0], -1, -1),
            img_ids=_grid(height, width, 1).to(x.device).expand(x.shape[0], -1, -1),
            return_dict=False,
        )[0]
        return output.transpose(1, 2).reshape(x.shape[0], -1, height, width)


def _grid(height: int, width: int, length: int) -> Tensor:
    """The coordinates of tokens, (height width length, 4)."""
    axes = (torch.arange(count) for count in (1, height, width, length))
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 4)
