"""The multimodal transformer of Stable Diffusion 3 (Esser et al. 2024): diffusers.SD3Transformer2DModel."""

from __future__ import annotations

from torch import Tensor

from latentdiff.networks.backbones.transformer import Transformer
from latentdiff.networks.conditions import Conditions
from latentdiff.networks.protocols import Spec


class MMDiT(Transformer):
    """It reads `tokens` (B, L, D) of the prompt beside those of the picture, and `pooled` (B, P) with the time."""

    @property
    def spec(self) -> Spec:
        """See Spec. Sides are multiples of a patch, and at most as long as the table of positions."""
        config = self.model.config
        patch = int(config.patch_size)
        largest = int(config.pos_embed_max_size) * patch
        return Spec(int(config.in_channels), int(config.out_channels), patch, self.texts, largest)

    def output(self, x: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """See Transformer."""
        output: Tensor = self.model(
            hidden_states=x,
            timestep=time,
            encoder_hidden_states=conditions["tokens"],
            pooled_projections=conditions["pooled"],
            return_dict=False,
        )[0]
        return output
