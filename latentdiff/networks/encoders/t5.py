"""Prompts to hidden states by T5's encoder (Raffel et al. 2020), as Stable Diffusion 3 and Flux read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from latentdiff.core.turn import Turn
from latentdiff.networks.encoders.prompt import Prompt, Style, parse, weighted
from latentdiff.networks.saving import save_network


class T5Text(nn.Module):
    """A prompt -> hidden states (L, D) of `length` tokens: cut, or padded, without a mask, as in training."""

    def __init__(self, tokenizer: Any, model: Any, length: int):
        super().__init__()
        self.tokenizer, self.model, self.length, self._turn = tokenizer, model, length, Turn()

    @property
    def width(self) -> int:
        """D."""
        return int(self.model.config.d_model)

    def cut(self, prompt: str, style: Style) -> int:
        """The number of a prompt's tokens that are beyond its length."""
        return max(0, self.count(prompt, style) - self.length)

    def count(self, prompt: str, style: Style) -> int:
        """The number of a prompt's tokens, with the end."""
        with self._turn:
            return len(self.tokenizer(_plain(prompt, style)[0], truncation=False, verbose=False).input_ids)

    @torch.no_grad()
    def encode(self, prompt: Prompt) -> Tensor:
        """Hidden states of a prompt; words of weight w are w times as far from the empty prompt's, see `weighted`."""
        text, ends = _plain(prompt.text, prompt.style)
        with self._turn:
            hidden, offsets = self._hidden(text)
            weights = np.ones((1, self.length, 1), np.float32)
            for place, (start, end) in enumerate(offsets):
                if end > start:
                    weights[0, place] = next(weight for last, weight in ends if end <= last)
            if (weights != 1).any():
                hidden = weighted(hidden, self._hidden("")[0], torch.from_numpy(weights).to(hidden))
            return hidden[0]

    def _hidden(self, text: str) -> tuple[Tensor, list[tuple[int, int]]]:
        """Hidden states (1, L, D), and the first and last character of each token."""
        read = self.tokenizer(
            text, padding="max_length", max_length=self.length, truncation=True, return_offsets_mapping=True
        )
        ids, place = torch.tensor([read.input_ids]), self.model.device
        if place.type != "meta":  # offloaded layers fetch their input
            ids = ids.to(place)
        return self.model(ids)[0], read.offset_mapping

    def save(self, directory: Path, suffix: str) -> None:
        """Write tokenizer and text encoder with that suffix."""
        self.tokenizer.save_pretrained(directory / f"tokenizer{suffix}")
        save_network(self.model, directory / f"text_encoder{suffix}")


def _plain(prompt: str, style: Style) -> tuple[str, list[tuple[int, float]]]:
    """A prompt without brackets, and where each piece of one weight ends. A BREAK is a space."""
    if not style.weights:
        return prompt, [(len(prompt), 1.0)]
    text, ends = "", []
    for section in parse(prompt):
        text += " " if text else ""
        for piece in section:
            text += piece.text
            ends.append((len(text), piece.weight))
    return text, ends or [(0, 1.0)]
