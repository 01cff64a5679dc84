"""SDXL's text: two encoders read the same prompt (Podell et al. 2023, section 2.1).

Their penultimate hidden states stand side by side in the context; the second's pooled text goes in by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from latentdiff.networks.conditions import Context, side_by_side
from latentdiff.networks.encoders.clip import END, TextEncoder
from latentdiff.networks.encoders.prompt import Reading, Style


class DualTextEncoder(nn.Module):
    """A prompt -> context (n L, D1 + D2) with pooled text (P,).

    zero_empty: the empty negative prompt is zeros, as the model was trained (`force_zeros_for_empty_prompt`).
    """

    def __init__(self, first: TextEncoder, second: TextEncoder, *, zero_empty: bool):
        super().__init__()
        self.first, self.second, self.zero_empty = first, second, zero_empty

    @property
    def encoders(self) -> list[TextEncoder]:
        """Both."""
        return [self.first, self.second]

    @property
    def tokenizer(self) -> object:
        """The first encoder's."""
        return self.first.tokenizer

    @property
    def max_length(self) -> int:
        """The number of tokens read at once, with start and end."""
        return self.first.max_length

    def read(self, prompt: str, style: Style = Style()) -> Reading:  # noqa: B008 - frozen
        """See TextEncoder.read; both have the same vocabulary."""
        return self.first.read(prompt, style)

    @torch.no_grad()
    def context(self, prompt: str, style: Style = Style(), *, least: int = 1) -> Context:  # noqa: B008 - frozen
        """See TextEncoder.context; the pooled text is the second's, of the first chunk."""
        first, second = (encoder.context(prompt, style, least=least) for encoder in (self.first, self.second))
        context = side_by_side(first, second)
        return context.zeros() if self.zero_empty and not prompt else context

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token ids (B, 2, max_length): the two pad with tokens of their own."""
        return torch.stack([encoder.tokenize(prompts) for encoder in self.encoders], 1)

    def forward(self, ids: Tensor) -> Context:
        """Token ids (B, 2, L) -> Context, as training reads them: no weights, cut."""
        first, second = (encoder(own) for encoder, own in zip(self.encoders, ids.unbind(1), strict=True))
        context = side_by_side(first, second)
        if not self.zero_empty:
            return context
        says = (ids[:, 0, 1] != self.first.tokenizer.convert_tokens_to_ids(END)).to(context.tokens)
        assert context.pooled is not None
        return Context(context.tokens * says[:, None, None], context.pooled * says[:, None])

    def save(self, directory: Path) -> None:
        """Write tokenizer/, text_encoder/, tokenizer_2/ and text_encoder_2/."""
        self.first.save(directory)
        self.second.save(directory, "_2")
