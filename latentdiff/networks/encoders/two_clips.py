"""Stable Diffusion XL's text: two encoders read the same prompt (Podell et al. 2023, section 2.1).

Their penultimate hidden states stand side by side in `tokens`; the second's pooled text is `pooled`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.networks.conditions import Conditions
from latentdiff.networks.encoders.clip import END, TextEncoder
from latentdiff.networks.encoders.joined import side_by_side
from latentdiff.networks.encoders.reading import TwoReading


class TwoTextEncoders(TwoReading, nn.Module):
    """See TwoReading."""

    kind = "two"

    def __init__(self, first: TextEncoder, second: TextEncoder, *, zero_empty: bool):
        nn.Module.__init__(self)
        TwoReading.__init__(self, first, second, zero_empty=zero_empty)

    @property
    def encoders(self) -> list[TextEncoder]:
        """Both encoders."""
        return [self.first, self.second]

    @property
    def texts(self) -> dict[str, Any]:
        """Both encoders, by the names of their parts."""
        return {"text_encoder": self.first, "text_encoder_2": self.second}

    @property
    def tokenizer(self) -> object:
        """The first encoder's tokenizer."""
        return self.first.tokenizer

    def options(self) -> dict[str, Any]:
        """What TwoReading takes beside the texts."""
        return {"zero_empty": self.zero_empty}

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token ids (B, 2, length): each encoder has its own padding."""
        return torch.stack([encoder.tokenize(prompts) for encoder in self.encoders], 1)

    def forward(self, ids: Tensor) -> Conditions:
        """Token ids (B, 2, L) -> conditions, as training reads prompts: without weights, cut."""
        first, second = (encoder(own) for encoder, own in zip(self.encoders, ids.unbind(1), strict=True))
        both = side_by_side(first, second)
        if not self.zero_empty:
            return both
        says = (ids[:, 0, 1] != self.first.tokenizer.convert_tokens_to_ids(END)).to(both["tokens"])
        return both.mapped(lambda tensor: tensor * says.reshape(-1, *[1] * (tensor.ndim - 1)))

    def save(self, directory: Path) -> None:
        """Write tokenizer/, text_encoder/, tokenizer_2/ and text_encoder_2/."""
        self.first.save(directory)
        self.second.save(directory, "_2")
