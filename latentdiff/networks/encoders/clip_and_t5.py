"""Flux.1's text: T5's hidden states are `tokens`, CLIP's pooled text is `pooled`."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from latentdiff.networks.conditions import Conditions
from latentdiff.networks.encoders.clip import TextEncoder
from latentdiff.networks.encoders.prompt import Prompt, Reading, Style, check_no_clip_skip, notes_on
from latentdiff.networks.encoders.t5 import T5Text


class ClipAndT5(nn.Module):
    """A prompt -> `tokens` (L, D), `pooled` (P,). CLIP reads a prompt's first chunk, T5 up to L tokens."""

    def __init__(self, first: TextEncoder, second: T5Text):
        super().__init__()
        self.first, self.second = first, second

    @property
    def encoders(self) -> list[TextEncoder]:
        """The CLIP."""
        return [self.first]

    @property
    def tokenizer(self) -> object:
        """CLIP's tokenizer."""
        return self.first.tokenizer

    @property
    def length(self) -> int:
        """L, which every prompt has."""
        return self.second.length

    def read(self, prompt: str, style: Style = Style()) -> Reading:  # noqa: B008 - frozen
        """See Encoder. There is one chunk."""
        cut = self.second.cut(prompt, style)
        notes = (
            *(notes_on(prompt) if style.weights else ()),
            *([f"T5 does not read its last {cut} tokens"] if cut else []),
        )
        return Reading(self.length if cut else self.second.count(prompt, style), 1, cut, notes)

    def encode(self, prompt: Prompt) -> Conditions:
        """See Encoder. Weights of words act on T5 alone: CLIP's pooled text is one vector."""
        check_no_clip_skip(prompt.style)
        return Conditions({"tokens": self.second.encode(prompt), "pooled": self.first.pooled(prompt)})

    def save(self, directory: Path) -> None:
        """Write tokenizer/, text_encoder/, tokenizer_2/ and text_encoder_2/."""
        self.first.save(directory)
        self.second.save(directory, "_2")
