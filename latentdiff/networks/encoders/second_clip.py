"""The text of a refiner: the second of two CLIPs alone (Podell et al. 2023, section 2.5)."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from latentdiff.networks.conditions import Conditions
from latentdiff.networks.encoders.clip import TextEncoder
from latentdiff.networks.encoders.joined import with_sizes
from latentdiff.networks.encoders.prompt import Prompt, Reading, Style


class SecondTextEncoder(nn.Module):
    """A prompt -> `tokens` (n L, D), `pooled` (P,) and, if sizes are known, `sizes` (5,)."""

    suffixes = ("_2",)  # of its folders

    def __init__(self, second: TextEncoder):
        super().__init__()
        self.second = second

    @property
    def encoders(self) -> list[TextEncoder]:
        """The one encoder."""
        return [self.second]

    @property
    def tokenizer(self) -> object:
        """Its tokenizer."""
        return self.second.tokenizer

    @property
    def length(self) -> int:
        """The number of tokens of a chunk, with start and end."""
        return self.second.length

    def read(self, prompt: str, style: Style = Style()) -> Reading:  # noqa: B008 - frozen
        """See Encoder."""
        return self.second.read(prompt, style)

    def encode(self, prompt: Prompt) -> Conditions:
        """See Encoder."""
        return with_sizes(self.second.encode(prompt), prompt.sizes)

    def save(self, directory: Path) -> None:
        """Write tokenizer_2/ and text_encoder_2/."""
        self.second.save(directory, "_2")
