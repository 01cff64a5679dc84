"""Prompts to context: CLIP's tokenizer and text transformer (Radford et al. 2021), from transformers.

The vocabulary is CLIP's own byte-pair encoding, which open_clip ships as a file, so no hub is needed.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from latentdiff.models.folder import let_others_read

Tokenizer = CLIPTokenizer
START, END = "<|startoftext|>", "<|endoftext|>"


class TextEncoder(nn.Module):
    """token ids (B, L) -> context (B, L, D), the last hidden states after the final layer norm."""

    def __init__(self, tokenizer: CLIPTokenizer, model: CLIPTextModel):
        super().__init__()
        self.tokenizer, self.model = tokenizer, model

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token ids (B, max_length), cut and padded with the end token as Stable Diffusion does."""
        return tokenize(self.tokenizer, prompts)

    def count_tokens(self, prompt: str) -> int:
        """How many tokens a prompt has, with start and end, before it is cut."""
        return len(self.tokenizer(prompt, truncation=False, verbose=False).input_ids)

    @property
    def max_length(self) -> int:
        """The number of tokens read, with start and end."""
        return int(self.tokenizer.model_max_length)

    def forward(self, ids: Tensor) -> Tensor:
        """See the class."""
        context: Tensor = self.model(ids).last_hidden_state
        return context

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """The context (B, L, D) of prompts, on the model's device."""
        context: Tensor = self(self.tokenize(prompts).to(self.model.device))
        return context

    def tokenizer_json(self) -> str:
        """The tokenizer as its file holds it, without the padding and cutting of whoever used it last."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        return str(backend.to_str())

    def save(self, directory: Path) -> None:
        """Write tokenizer/ and text_encoder/."""
        self.tokenizer.save_pretrained(directory / "tokenizer")
        # the same file again without white space, which is half of it
        (directory / "tokenizer" / "tokenizer.json").write_text(self.tokenizer_json(), encoding="utf-8")
        self.model.save_pretrained(directory / "text_encoder", safe_serialization=True)
        let_others_read(directory / "text_encoder")


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    """Token ids (B, max_length)."""
    encoded = tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt")
    ids: Tensor = encoded.input_ids
    return ids


def clip_tokenizer(max_length: int) -> CLIPTokenizer:
    """CLIP's tokenizer, from the merges that open_clip ships.

    The vocabulary is CLIP's: 256 bytes, the same ending a word, one entry a merge, start and end.
    """
    from open_clip.tokenizer import bytes_to_unicode, default_bpe

    with gzip.open(default_bpe(), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    merges = lines[1 : 49152 - 256 - 2 + 1]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{c}</w>" for c in letters), *("".join(m.split()) for m in merges), START, END]
    return CLIPTokenizer(
        vocab={word: index for index, word in enumerate(words)},
        merges=[tuple(m.split()) for m in merges],
        model_max_length=max_length,
    )
