"""Prompts to hidden states of a language model, as the user's turn of a chat (Qwen team 2025)."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.core.turn import Turn
from latentdiff.networks.encoders.reading import Chat, ChatReading
from latentdiff.networks.encoders.t5 import tokenizer_json
from latentdiff.networks.saving import save_network
from latentdiff.networks.traced import Traced

PART = "text_encoder"


class ChatText(ChatReading, nn.Module):
    """See ChatReading."""

    kind = "chat"

    def __init__(self, tokenizer: Any, model: Any, chat: Chat):
        nn.Module.__init__(self)
        self.tokenizer, self.model, self.chat, self._turn = tokenizer, model, chat, Turn()

    @property
    def width(self) -> int:
        """D."""
        config = self.model.config
        return int(getattr(config, "text_config", config).hidden_size) * len(self.chat.layers)

    @property
    def pad(self) -> int:  # type: ignore[override]
        """See ChatReading."""
        return int(self.tokenizer.pad_token_id)

    def words(self, text: str) -> list[int]:
        """See ChatReading."""
        ids: list[int] = self.tokenizer(text, truncation=False, verbose=False).input_ids
        return ids

    @torch.no_grad()
    def states(self, ids: list[int], marks: list[int]) -> Tensor:
        """See ChatReading."""
        place = self.model.device
        rows = (torch.tensor([each]) for each in (ids, marks))
        return self._states(*(each if place.type == "meta" else each.to(place) for each in rows))[
            0
        ]  # offloaded: fetched

    def _states(self, ids: Tensor, marks: Tensor) -> Tensor:
        network = getattr(self.model, self.model.base_model_prefix, self.model)  # without the next word's scores
        hidden = network(ids, attention_mask=marks, output_hidden_states=True, use_cache=False).hidden_states
        return self._chosen(hidden)

    def _chosen(self, hidden: Any) -> Tensor:
        return torch.cat([hidden[layer] for layer in self.chat.layers], -1)

    @property
    def texts(self) -> dict[str, ChatText]:
        """Its parts with weights: itself."""
        return {PART: self}

    def options(self) -> dict[str, Any]:
        """See TextEncoder."""
        return {}

    def traced(self, part: str = PART) -> dict[str, Traced]:
        """Ids and marks (1, L) -> hidden states (1, L, D)."""

        def function(ids: Tensor, marks: Tensor) -> Tensor:
            model = getattr(self.model, self.model.base_model_prefix, self.model)
            model = getattr(model, "language_model", model)  # beside a vision network
            length = ids.shape[1]
            earlier = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
            seen = earlier[None, None] & marks[:, None, None, :].bool()  # the library's own mask wants Python numbers
            places = torch.arange(length, device=ids.device)[None]
            output = model(ids, attention_mask=seen, position_ids=places, output_hidden_states=True, use_cache=False)
            return self._chosen(output.hidden_states)

        inputs = [
            {"ids": torch.arange(length)[None] % 100, "marks": (torch.arange(length) < length - 3).long()[None]}
            for length in (70, 41)
        ]
        return {part: Traced(part, self.model, function, inputs, self._states)}

    def facts(self) -> dict[str, Any]:
        """See Traceable."""
        chat = asdict(self.chat) | {"layers": list(self.chat.layers)}
        return {"kind": self.kind, "pad": self.pad, "chat": chat | {"filled": chat.pop("reads_padding")}}

    def tokenizer_json(self) -> str:
        """See TextEncoder."""
        return tokenizer_json(self.tokenizer)

    def save(self, directory: Path) -> None:
        """Write tokenizer/ and text_encoder/."""
        self.tokenizer.save_pretrained(directory / "tokenizer")
        save_network(self.model, directory / PART)
