"""Flux.1's text: T5's hidden states are `tokens`, CLIP's pooled text is `pooled`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from latentdiff.networks.encoders.clip import TextEncoder
from latentdiff.networks.encoders.reading import ClipAndT5Reading
from latentdiff.networks.encoders.t5 import T5Text


class ClipAndT5(ClipAndT5Reading, nn.Module):
    """See ClipAndT5Reading."""

    kind = "clip_and_t5"

    def __init__(self, first: TextEncoder, second: T5Text):
        nn.Module.__init__(self)
        ClipAndT5Reading.__init__(self, first, second)

    @property
    def encoders(self) -> list[TextEncoder]:
        """The CLIP."""
        return [self.first]

    @property
    def texts(self) -> dict[str, Any]:
        """Both, by the names of their parts."""
        return {"text_encoder": self.first, "text_encoder_2": self.second}

    @property
    def tokenizer(self) -> object:
        """CLIP's tokenizer."""
        return self.first.tokenizer

    def options(self) -> dict[str, Any]:
        """What ClipAndT5Reading takes beside the texts."""
        return {}

    def save(self, directory: Path) -> None:
        """Write tokenizer/, text_encoder/, tokenizer_2/ and text_encoder_2/."""
        self.first.save(directory)
        self.second.save(directory, "_2")
