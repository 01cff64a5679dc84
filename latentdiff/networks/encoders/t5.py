"""Prompts to hidden states by T5's encoder (Raffel et al. 2020), as Stable Diffusion 3 and Flux read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.core.turn import Turn
from latentdiff.networks.encoders.reading import T5Reading
from latentdiff.networks.saving import save_network
from latentdiff.networks.traced import Traced


class T5Text(T5Reading, nn.Module):
    """See T5Reading."""

    kind = "t5"

    def __init__(self, tokenizer: Any, model: Any, length: int):
        nn.Module.__init__(self)
        self.tokenizer, self.model, self.length, self._turn = tokenizer, model, length, Turn()

    @property
    def width(self) -> int:
        """D."""
        return int(self.model.config.d_model)

    @property
    def pad(self) -> int:  # type: ignore[override]
        """See T5Reading."""
        return int(self.tokenizer.pad_token_id)

    def words(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """See T5Reading."""
        read = self.tokenizer(text, truncation=False, return_offsets_mapping=True, verbose=False)
        return read.input_ids, read.offset_mapping

    @torch.no_grad()
    def states(self, ids: list[int]) -> Tensor:
        """See T5Reading."""
        rows, place = torch.tensor([ids]), self.model.device
        hidden: Tensor = self.model(rows if place.type == "meta" else rows.to(place))[0]  # offloaded: fetched
        return hidden

    def traced(self, part: str) -> dict[str, Traced]:
        """Ids (n, L) -> hidden states (n, L, D)."""
        inputs = [{"ids": torch.arange(rows * self.length).view(rows, -1) % 100} for rows in (2, 1)]
        return {part: Traced(part, self.model, lambda ids: self.model(ids)[0], inputs)}

    def facts(self) -> dict[str, Any]:
        """See Traceable."""
        return {"kind": self.kind, "length": self.length, "pad": self.pad}

    def tokenizer_json(self) -> str:
        """See TextEncoder."""
        return tokenizer_json(self.tokenizer)

    def save(self, directory: Path, suffix: str) -> None:
        """Write tokenizer and text encoder with that suffix."""
        self.tokenizer.save_pretrained(directory / f"tokenizer{suffix}")
        save_network(self.model, directory / f"text_encoder{suffix}")


def tokenizer_json(tokenizer: Any) -> str:
    """A tokenizer's file, without the padding and cutting of its last use."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return str(backend.to_str())
