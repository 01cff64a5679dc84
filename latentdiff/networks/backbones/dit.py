"""The diffusion transformer (Peebles & Xie 2023): diffusers.DiTTransformer2DModel, which draws classes."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor

from latentdiff.networks.backbones.transformer import Transformer
from latentdiff.networks.conditions import Conditions
from latentdiff.networks.protocols import Spec
from latentdiff.networks.traced import Inputs, example


class DiT(Transformer):
    """It reads `label` (B,), a class; a label equal to the number of classes means none. It draws squares only."""

    def __init__(self, model: Any):
        super().__init__(model)
        for module in model.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0  # it would drop labels by torch's global generator

    @classmethod
    def create(
        cls, *, sample_size: int, channels: int, classes: int, patch_size: int, layers: int, heads: int, head_width: int
    ) -> DiT:
        """A new transformer with random weights, whose blocks begin as the identity (section 3.2, adaLN-Zero)."""
        model = DiTTransformer2DModel(
            sample_size=sample_size,
            in_channels=channels,
            out_channels=channels,
            patch_size=patch_size,
            num_layers=layers,
            num_attention_heads=heads,
            attention_head_dim=head_width,
            num_embeds_ada_norm=classes,
        )
        for block in model.transformer_blocks:
            torch.nn.init.zeros_(block.norm1.linear.weight)
            torch.nn.init.zeros_(block.norm1.linear.bias)
        for layer in (model.proj_out_1, model.proj_out_2):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
        return cls(model)

    @property
    def classes(self) -> int:
        """The number of classes."""
        return int(self.model.config.num_embeds_ada_norm)

    @property
    def spec(self) -> Spec:
        """See Spec."""
        config = self.model.config
        channels = int(config.in_channels)
        return Spec(channels, channels, int(config.patch_size), {"label": ()}, square=True)

    def output(self, x: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """See Transformer. A learnt variance, in further channels, is not used, as in diffusers' pipeline."""
        output: Tensor = self.model(x, time, conditions["label"].long(), return_dict=False)[0]
        return output[:, : x.shape[1]]

    def facts(self) -> dict[str, Any]:
        """See Traceable. A graph holds the places of the size that it was traced with."""
        return super().facts() | {"side": int(self.model.config.sample_size)}

    def _examples(self, channels: int) -> list[Inputs]:
        side = int(self.model.config.sample_size)
        labels = torch.arange(4.0) % (self.classes + 1)
        return [
            {"x": example(rows, channels, side, side), "time": torch.tensor([501.0]), "label": labels[:rows]}
            for rows in (3, 1)
        ]
