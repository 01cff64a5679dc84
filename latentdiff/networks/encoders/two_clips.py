"""Stable Diffusion XL's text: two encoders read the same prompt (Podell et al. 2023, section 2.1).

Their penultimate hidden states stand side by side in `tokens`; the second's pooled text is `pooled`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from latentdiff.networks.conditions import Conditions
from latentdiff.networks.encoders.clip import END, TextEncoder
from latentdiff.networks.encoders.joined import side_by_side, with_both
from latentdiff.networks.encoders.prompt import Prompt, Reading, Style


class TwoTextEncoders(nn.Module):
    """A prompt -> `tokens` (n L, D1 + D2), `pooled` (P,) and, if sizes are known, `sizes` (6,).

    zero_empty: the conditions of the empty prompt are zeros, as in training (`force_zeros_for_empty_prompt`).
    """

    def __init__(self, first: TextEncoder, second: TextEncoder, *, zero_empty: bool):
        super().__init__()
        self.first, self.second, self.zero_empty = first, second, zero_empty

    @property
    def encoders(self) -> list[TextEncoder]:
        """Both encoders."""
        return [self.first, self.second]

    @property
    def tokenizer(self) -> object:
        """The first encoder's tokenizer."""
        return self.first.tokenizer

    @property
    def length(self) -> int:
        """The number of tokens of a chunk, with start and end."""
        return self.first.length

    def read(self, prompt: str, style: Style = Style()) -> Reading:  # noqa: B008 - frozen
        """See Encoder; both have the same vocabulary."""
        return self.first.read(prompt, style)

    def encode(self, prompt: Prompt) -> Conditions:
        """See Encoder and `with_both`."""
        return with_both(self.first.encode(prompt), self.second.encode(prompt), prompt, zero_empty=self.zero_empty)

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
