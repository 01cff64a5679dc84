"""The transformer of Qwen-Image (Alibaba 2025): diffusers.QwenImageTransformer2DModel."""

from __future__ import annotations

from torch import Tensor

from latentdiff.networks.backbones.packing import PATCH, Packing, packed, unpacked
from latentdiff.networks.backbones.transformer import Transformer
from latentdiff.networks.conditions import Conditions
from latentdiff.networks.protocols import Spec


class QwenImage(Packing, Transformer):
    """It reads `tokens` (B, L, D) of the prompt, those that `mask` (B, L) marks if there is one."""

    @property
    def spec(self) -> Spec:
        """See Spec."""
        config = self.model.config
        reads = {"tokens": (None, int(config.joint_attention_dim))}
        return Spec(int(config.in_channels) // PATCH**2, int(config.out_channels), PATCH, reads)

    def output(self, x: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """See Transformer. Tokens after the longest prompt are left out."""
        height, width = x.shape[-2] // PATCH, x.shape[-1] // PATCH
        tokens, mask = conditions["tokens"], conditions.get("mask")
        if mask is not None:
            longest = int(mask.sum(1).max())
            tokens, mask = tokens[:, :longest], mask[:, :longest].long()
        output: Tensor = self.model(
            hidden_states=packed(x),
            timestep=(time / 1000).to(x.dtype),
            encoder_hidden_states=tokens,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, height, width)]] * len(x),
            return_dict=False,
        )[0]
        return unpacked(output, height, width)
