"""Prompts to hidden states of a language model, as the user's turn of a chat (Qwen team 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from latentdiff.core.turn import Turn
from latentdiff.networks.conditions import Conditions
from latentdiff.networks.encoders.prompt import Prompt, Reading, Style, check_no_clip_skip, notes_on, parse
from latentdiff.networks.saving import save_network


@dataclass(frozen=True)
class Chat:
    """How a language model reads a prompt.

    before, after: the text around it, by the model's own template, which is a program and therefore never run.
    length: of the tokens, with those around the prompt, except for the first `dropped`, which are not used. layers: the
    numbers of the hidden states that stand side by side, 0 for the embeddings, negative from the end. filled: whether
    the backbone reads the padding too, and there is no `mask`.
    """

    before: str
    after: str
    length: int = 512
    layers: Sequence[int] = (-1,)
    dropped: int = 0
    filled: bool = False


class ChatText(nn.Module):
    """A prompt -> `tokens` (L, D), and `mask` (L,) unless padding counts."""

    def __init__(self, tokenizer: Any, model: Any, chat: Chat):
        super().__init__()
        self.tokenizer, self.model, self.chat, self._turn = tokenizer, model, chat, Turn()

    @property
    def width(self) -> int:
        """D."""
        config = self.model.config
        return int(getattr(config, "text_config", config).hidden_size) * len(self.chat.layers)

    @property
    def length(self) -> int:
        """L, which every prompt has."""
        return self.chat.length

    def read(self, prompt: str, style: Style = Style()) -> Reading:  # noqa: B008 - frozen
        """See Encoder. Words have no weights here: a language model's tokens carry the meaning of others too."""
        with self._turn:
            count = len(self._ids(prompt, truncation=False, verbose=False).input_ids) - self.chat.dropped
        notes: list[str] = []
        if style.weights:
            weighted = any(piece.weight != 1 for section in parse(prompt) for piece in section)
            notes += ["this model has no weights of words: brackets are text"] if weighted else notes_on(prompt)
        return Reading(min(count, self.length), 1, max(0, count - self.length), tuple(notes))

    @torch.no_grad()
    def encode(self, prompt: Prompt) -> Conditions:
        """See Encoder."""
        check_no_clip_skip(prompt.style)
        chat = self.chat
        with self._turn:
            filled = "max_length" if chat.filled else False
            read = self._ids(prompt.text, padding=filled, truncation=True, max_length=self.length + chat.dropped)
            place = self.model.device
            given = (torch.tensor([each]) for each in (read.input_ids, read.attention_mask))
            ids, marks = (each if place.type == "meta" else each.to(place) for each in given)  # offloaded: fetched
            network = getattr(self.model, self.model.base_model_prefix, self.model)  # without the next word's scores
            hidden = network(ids, attention_mask=marks, output_hidden_states=True, use_cache=False).hidden_states
        tokens = torch.cat([hidden[layer][0, chat.dropped :] for layer in chat.layers], -1)
        if chat.filled:
            return Conditions({"tokens": tokens})
        more = self.length - len(tokens)
        return Conditions({"tokens": pad(tokens, (0, 0, 0, more)), "mask": pad(_ones(tokens), (0, more))})

    def _ids(self, prompt: str, **options: Any) -> Any:
        return self.tokenizer(self.chat.before + prompt + self.chat.after, **options)

    def save(self, directory: Path) -> None:
        """Write tokenizer/ and text_encoder/."""
        self.tokenizer.save_pretrained(directory / "tokenizer")
        save_network(self.model, directory / "text_encoder")


def _ones(tokens: Tensor) -> Tensor:
    return torch.ones(len(tokens), device=tokens.device)
