"""The text of a refiner: the second of two CLIPs alone (Podell et al. 2023, section 2.5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from latentdiff.networks.encoders.clip import TextEncoder
from latentdiff.networks.encoders.reading import SecondReading


class SecondTextEncoder(SecondReading, nn.Module):
    """See SecondReading."""

    kind = "second"
    suffixes = ("_2",)  # of its folders

    def __init__(self, second: TextEncoder):
        nn.Module.__init__(self)
        SecondReading.__init__(self, second)

    @property
    def encoders(self) -> list[TextEncoder]:
        """The one encoder."""
        return [self.second]

    @property
    def texts(self) -> dict[str, Any]:
        """The one encoder, by the name of its part."""
        return {"text_encoder_2": self.second}

    @property
    def tokenizer(self) -> object:
        """Its tokenizer."""
        return self.second.tokenizer

    def options(self) -> dict[str, Any]:
        """What SecondReading takes beside the text."""
        return {}

    def save(self, directory: Path) -> None:
        """Write tokenizer_2/ and text_encoder_2/."""
        self.second.save(directory, "_2")
