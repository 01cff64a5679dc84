"""Stable Diffusion 3's text: two CLIPs and T5 read the same prompt (Esser et al. 2024, section 4.1).

The CLIPs' penultimate hidden states stand side by side, filled with zeros to T5's width, and T5's come after them, in
`tokens`. Both pooled texts stand side by side in `pooled`. Without T5, which takes most of the memory, its tokens are
zeros.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from latentdiff.networks.conditions import Conditions
from latentdiff.networks.encoders.clip import TextEncoder
from latentdiff.networks.encoders.prompt import Prompt, Reading, Style
from latentdiff.networks.encoders.t5 import T5Text

T5_LENGTH = 256  # tokens that T5 reads


class ThreeTextEncoders(nn.Module):
    """A prompt -> `tokens` (n L + L3, D), `pooled` (P1 + P2,). width: D, which the backbone reads."""

    def __init__(self, first: TextEncoder, second: TextEncoder, third: T5Text | None, width: int):
        super().__init__()
        self.first, self.second, self.third, self.width = first, second, third, width

    @property
    def encoders(self) -> list[TextEncoder]:
        """The CLIPs."""
        return [self.first, self.second]

    @property
    def tokenizer(self) -> object:
        """The first encoder's tokenizer."""
        return self.first.tokenizer

    @property
    def length(self) -> int:
        """The number of CLIP's tokens of a chunk, with start and end."""
        return self.first.length

    def read(self, prompt: str, style: Style = Style()) -> Reading:  # noqa: B008 - frozen
        """See Encoder: how the CLIPs read it; T5 reads all at once."""
        reading = self.first.read(prompt, style)
        cut = 0 if self.third is None else self.third.cut(prompt, style)
        return reading._replace(notes=(*reading.notes, f"T5 does not read its last {cut} tokens")) if cut else reading

    def encode(self, prompt: Prompt) -> Conditions:
        """See Encoder."""
        first, second = self.first.encode(prompt), self.second.encode(prompt)
        clips = torch.cat([first["tokens"], second["tokens"]], -1)
        tokens = torch.cat([functional.pad(clips, (0, self.width - clips.shape[-1])), self._third(prompt, clips)])
        return Conditions({"tokens": tokens, "pooled": torch.cat([first["pooled"], second["pooled"]], -1)})

    def _third(self, prompt: Prompt, like: Tensor) -> Tensor:
        if self.third is None:
            return like.new_zeros(T5_LENGTH, self.width)
        return self.third.encode(prompt).to(like.dtype)

    def save(self, directory: Path) -> None:
        """Write tokenizer/, text_encoder/ and those with _2 and _3."""
        for encoder, suffix in zip(self.encoders, ("", "_2"), strict=True):
            encoder.save(directory, suffix)
        if self.third is not None:
            self.third.save(directory, "_3")
