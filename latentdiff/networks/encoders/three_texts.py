"""Stable Diffusion 3's text: two CLIPs and T5 read the same prompt (Esser et al. 2024, section 4.1).

The CLIPs' penultimate hidden states stand side by side, filled with zeros to T5's width, and T5's come after them, in
`tokens`. Both pooled texts stand side by side in `pooled`. Without T5, which takes most of the memory, its tokens are
zeros.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from latentdiff.networks.encoders.clip import TextEncoder
from latentdiff.networks.encoders.reading import ThreeReading
from latentdiff.networks.encoders.t5 import T5Text


class ThreeTextEncoders(ThreeReading, nn.Module):
    """See ThreeReading. width: D, which the backbone reads."""

    kind = "three"

    def __init__(self, first: TextEncoder, second: TextEncoder, third: T5Text | None, width: int):
        nn.Module.__init__(self)
        ThreeReading.__init__(self, first, second, third, width)

    @property
    def encoders(self) -> list[TextEncoder]:
        """The CLIPs."""
        return [self.first, self.second]

    @property
    def texts(self) -> dict[str, Any]:
        """All of them, by the names of their parts."""
        third = {} if self.third is None else {"text_encoder_3": self.third}
        return {"text_encoder": self.first, "text_encoder_2": self.second, **third}

    @property
    def tokenizer(self) -> object:
        """The first encoder's tokenizer."""
        return self.first.tokenizer

    def options(self) -> dict[str, Any]:
        """What ThreeReading takes beside the texts."""
        return {"width": self.width}

    def save(self, directory: Path) -> None:
        """Write tokenizer/, text_encoder/ and those with _2 and _3."""
        for encoder, suffix in zip(self.encoders, ("", "_2"), strict=True):
            encoder.save(directory, suffix)
        if self.third is not None:
            self.third.save(directory, "_3")
