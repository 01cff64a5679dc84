"""How texts of several kinds are read, whatever library computes the networks: T5's, a chat's, and several at once.

A class here has no network. Those of torch and of OpenVINO inherit from it, and give it ids and hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any
from unicodedata import normalize

import numpy as np

from latentdiff.core.arrays import Array, beside, library, zeros
from latentdiff.core.errors import ConfigError
from latentdiff.core.turn import Turn
from latentdiff.networks.conditions import Conditions
from latentdiff.networks.encoders.joined import with_both, with_sizes
from latentdiff.networks.encoders.prompt import (
    Prompt,
    Reading,
    Style,
    check_no_clip_skip,
    has_weights,
    notes_on,
    parse,
    weighted,
)

PLAIN = Style()
T5_LENGTH = 256  # tokens that T5 reads beside two CLIPs


class T5Reading:
    """A prompt -> hidden states (L, D) of `length` tokens: cut, or padded, without a mask, as in training."""

    length: int
    pad: int  # the id of padding
    _turn: Turn

    def words(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a text with its end, and the first and last character of each."""
        raise NotImplementedError

    def states(self, ids: list[int]) -> Array:
        """The hidden states (1, L, D) of L ids."""
        raise NotImplementedError

    def cut(self, prompt: str, style: Style) -> int:
        """The number of a prompt's tokens that are beyond its length."""
        return max(0, self.count(prompt, style) - self.length)

    def count(self, prompt: str, style: Style) -> int:
        """The number of a prompt's tokens, with the end."""
        with self._turn:
            return len(self.words(_plain(prompt, style)[0])[0])

    def encode(self, prompt: Prompt) -> Array:
        """Hidden states of a prompt; words of weight w are w times as far from the empty prompt's, see `weighted`."""
        text, ends = _plain(prompt.text, prompt.style)
        with self._turn:
            hidden, places = self._hidden(text)
            weights = np.ones((1, self.length, 1), np.float32)
            for index, (start, end) in enumerate(places):
                if end > start:
                    weights[0, index] = next(weight for last, weight in ends if end <= last)
            if (weights != 1).any():
                hidden = weighted(hidden, self._hidden("")[0], beside(hidden, weights))
            return hidden[0]

    def _hidden(self, text: str) -> tuple[Array, list[tuple[int, int]]]:
        """Hidden states (1, L, D), and the first and last character of each token before the padding."""
        ids, places = self.words(text)
        if len(ids) > self.length:  # the end stays
            ids, places = ids[: self.length - 1] + ids[-1:], places[: self.length - 1]
        return self.states(ids + [self.pad] * (self.length - len(ids))), places


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


@dataclass(frozen=True)
class Chat:
    """How a language model reads a prompt.

    before, after: the text around it, by the model's own template, which is a program and therefore never run.
    length: of the tokens, with those around the prompt, except for the first `dropped`, which are not used. layers: the
    numbers of the hidden states that stand side by side, 0 for the embeddings, negative from the end.
    reads_padding: whether the backbone reads the padding too, and there is no `mask`.
    """

    before: str
    after: str
    length: int = 512
    layers: Sequence[int] = (-1,)
    dropped: int = 0
    reads_padding: bool = False


class ChatReading:
    """A prompt -> `tokens` (L, D), and `mask` (L,) unless padding counts."""

    chat: Chat
    pad: int  # the id of padding
    _turn: Turn

    def words(self, text: str) -> list[int]:
        """The ids of a text."""
        raise NotImplementedError

    def states(self, ids: list[int], marks: list[int]) -> Array:
        """The hidden states (L, D) of L ids, of the layers of the chat side by side. marks: 0 for padding."""
        raise NotImplementedError

    @property
    def length(self) -> int:
        """L, which every prompt has."""
        return self.chat.length

    def read(self, prompt: str, style: Style = PLAIN) -> Reading:
        """See Encoder. Words have no weights here: a language model's tokens carry the meaning of others too."""
        with self._turn:
            count = len(self._ids(prompt)) - self.chat.dropped
        notes: list[str] = []
        if style.weights:
            is_weighted = has_weights(prompt)
            notes += ["this model has no word weights: brackets are text"] if is_weighted else notes_on(prompt)
        return Reading(min(count, self.length), 1, max(0, count - self.length), tuple(notes))

    def encode(self, prompt: Prompt) -> Conditions:
        """See Encoder."""
        check_no_clip_skip(prompt.style)
        chat, most = self.chat, self.length + self.chat.dropped
        with self._turn:
            ids = self._ids(prompt.text)[:most]
            more = most - len(ids) if chat.reads_padding else 0
            hidden = self.states(ids + [self.pad] * more, [1] * len(ids) + [0] * more)
        tokens = hidden[chat.dropped :]
        if chat.reads_padding:
            return Conditions({"tokens": tokens})
        padding, count = zeros(tokens, (self.length - len(tokens), *tokens.shape[1:])), len(tokens)
        mask = beside(tokens, np.float32(np.arange(self.length) < count), exact=True)
        return Conditions({"tokens": library(tokens).concatenate([tokens, padding]), "mask": mask})

    def _ids(self, prompt: str) -> list[int]:
        return self.words(self.chat.before + prompt + self.chat.after)


class ClassReading:
    """A class's name, one of its names between commas, or its number -> `label` (); the empty prompt is no class.

    names: one for each class; the label after the last one means no class.
    """

    length = 1

    def __init__(self, names: Sequence[str]):
        self.names = tuple(names)
        numbered = list(reversed(list(enumerate(self.names))))  # of two equal names the first one counts
        parts = {part.strip(): number for number, name in numbered for part in name.split(",")}
        wholes = {name: number for number, name in numbered}
        known = {str(number): number for number, _ in numbered} | parts | wholes | {"": len(self.names)}
        self._known = {normalize("NFC", name): number for name, number in known.items()}

    def label(self, name: str) -> int:
        """The number of a class. Raises ConfigError for an unknown name."""
        name = normalize("NFC", name)
        if (number := self._known.get(name.strip())) is None:
            near = get_close_matches(name.strip(), [known for known in self._known if known], n=1)
            meant = f" (did you mean {near[0]}?)" if near else ""
            raise ConfigError(f"this model has no class {name[:60]!r}{meant}")
        return number

    def read(self, prompt: str, style: Style = PLAIN) -> Reading:
        """See Encoder."""
        self.label(prompt)
        return Reading(1, 1, 0)

    def encode(self, prompt: Prompt) -> Conditions:
        """See Encoder."""
        return Conditions({"label": np.float32(self.label(prompt.text)).reshape(())})


class TwoReading:
    """A prompt -> `tokens` (n L, D1 + D2), `pooled` (P,) and, if sizes are known, `sizes` (6,).

    zero_empty: the conditions of the empty prompt are zeros, as in training (`force_zeros_for_empty_prompt`).
    """

    def __init__(self, first: Any, second: Any, *, zero_empty: bool):
        self.first, self.second, self.zero_empty = first, second, zero_empty

    @property
    def length(self) -> int:
        """The number of tokens of a chunk, with start and end."""
        return int(self.first.length)

    def read(self, prompt: str, style: Style = PLAIN) -> Reading:
        """See Encoder; both have the same vocabulary."""
        reading: Reading = self.first.read(prompt, style)
        return reading

    def encode(self, prompt: Prompt) -> Conditions:
        """See Encoder and `with_both`."""
        return with_both(self.first.encode(prompt), self.second.encode(prompt), prompt, zero_empty=self.zero_empty)


class SecondReading:
    """A prompt -> `tokens` (n L, D), `pooled` (P,) and, if sizes are known, `sizes` (5,)."""

    def __init__(self, second: Any):
        self.second = second

    @property
    def length(self) -> int:
        """The number of tokens of a chunk, with start and end."""
        return int(self.second.length)

    def read(self, prompt: str, style: Style = PLAIN) -> Reading:
        """See Encoder."""
        reading: Reading = self.second.read(prompt, style)
        return reading

    def encode(self, prompt: Prompt) -> Conditions:
        """See Encoder."""
        return with_sizes(self.second.encode(prompt), prompt.sizes)


class ClipAndT5Reading:
    """A prompt -> `tokens` (L, D), `pooled` (P,). CLIP reads a prompt's first chunk, T5 up to L tokens."""

    def __init__(self, first: Any, second: Any):
        self.first, self.second = first, second

    @property
    def length(self) -> int:
        """L, which every prompt has."""
        return int(self.second.length)

    def read(self, prompt: str, style: Style = PLAIN) -> Reading:
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


class ThreeReading:
    """A prompt -> `tokens` (n L + L3, D), `pooled` (P1 + P2,). width: D, which the backbone reads."""

    def __init__(self, first: Any, second: Any, third: Any, width: int):
        self.first, self.second, self.third, self.width = first, second, third, width

    @property
    def length(self) -> int:
        """The number of CLIP's tokens of a chunk, with start and end."""
        return int(self.first.length)

    def read(self, prompt: str, style: Style = PLAIN) -> Reading:
        """See Encoder: how the CLIPs read it; T5 reads all at once."""
        reading: Reading = self.first.read(prompt, style)
        cut = 0 if self.third is None else self.third.cut(prompt, style)
        return reading._replace(notes=(*reading.notes, f"T5 does not read its last {cut} tokens")) if cut else reading

    def encode(self, prompt: Prompt) -> Conditions:
        """See Encoder."""
        first, second = self.first.encode(prompt), self.second.encode(prompt)
        join = library(first["tokens"]).concatenate
        clips = join([first["tokens"], second["tokens"]], -1)
        filled = join([clips, zeros(clips, (len(clips), self.width - clips.shape[-1]))], -1)
        third = zeros(clips, (T5_LENGTH, self.width)) if self.third is None else self.third.encode(prompt)
        pooled = join([first["pooled"], second["pooled"]], -1)
        return Conditions({"tokens": join([filled, beside(filled, third)]), "pooled": pooled})
