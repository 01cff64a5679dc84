"""The transformer of Flux.1 (Black Forest Labs 2024): diffusers.FluxTransformer2DModel.

It reads latents in tokens of 2 x 2, each with its row and column, after the tokens of the prompt. Kontext reads those
of an input picture after them (Black Forest Labs 2025).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from latentdiff.networks.backbones.packing import PATCH, Packing, packed, unpacked
from latentdiff.networks.backbones.transformer import GRAPH, Transformer
from latentdiff.networks.conditions import Conditions
from latentdiff.networks.protocols import Spec
from latentdiff.networks.traced import Traced

EDIT = f"{GRAPH}_edit"


class Flux(Packing, Transformer):
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
        tokens, pictures = conditions["tokens"], torch.split(x, self.spec.outputs, 1)
        output = self.model(
            hidden_states=torch.cat([packed(picture) for picture in pictures], 1),
            timestep=(time / 1000).to(x.dtype),
            guidance=conditions.get("guidance"),
            encoder_hidden_states=tokens,
            pooled_projections=conditions["pooled"],
            txt_ids=torch.zeros(tokens.shape[1], 3, device=x.device, dtype=x.dtype),
            img_ids=torch.cat([places(height, width, number) for number in range(len(pictures))]).to(x),
            return_dict=False,
        )[0]
        return unpacked(output[:, : height * width], height, width)


class Kontext(Flux):
    """It also reads the latents of a picture beside x, as further channels, if there is one."""

    @property
    def spec(self) -> Spec:
        """See Spec."""
        plain = super().spec
        return replace(plain, inputs=2 * plain.inputs)

    def traced(self) -> dict[str, Traced]:
        """Two graphs: with a picture and without."""
        return {GRAPH: self._traced(self.spec.outputs), EDIT: self._traced(self.spec.inputs)}

    def facts(self) -> dict[str, Any]:
        """See Traceable."""
        return super().facts() | {"graphs": {str(self.spec.outputs): GRAPH, str(self.spec.inputs): EDIT}}


def places(height: int, width: int, picture: int = 0) -> Tensor:
    """The place of each token, (h w, 3): the number of its picture, row, column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.full_like(rows, picture), rows, columns], -1).reshape(-1, 3)
