r"""Prompts as people write them, with weights, breaks and any length -> chunks of token ids and weights.

    (word)      1.1 times the attention        (word:1.3)    1.3 times        [word]    1 / 1.1 times
    BREAK       begins a new chunk                            \( \) \[ \] \\   the character itself

Weights of nested brackets multiply; a bracket without a partner is a character. A text encoder reads one chunk at a
time: a start, up to 75 tokens, an end.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from latentdiff.core.arrays import Array, library
from latentdiff.core.errors import ConfigError

STRONGER = 1.1
LARGEST_WEIGHT = 10.0
_WORDS = re.compile(r"\\[\\()\[\]]|:\s*([-+]?(?:\d+\.?\d*|\.\d+))\s*\)|[()\[\]]|[^\\()\[\]:]+|[\\:]")
_BREAK = re.compile(r"\bBREAK\b")
_OF_A1111 = {  # what its prompts may hold -> its name there
    r"\[[^\[\]()]*:[^\[\]()]*:\s*[\d.]+\s*\]|\[[^\[\]():]*:\s*[\d.]+\s*\]": "prompt editing",
    r"\[[^\[\]()]*\|[^\[\]()]*\]": "alternation",
    r"(?<!\w)AND(?!\w)": "AND between prompts",
}
_ELSEWHERE = re.compile(r"<(lora|lyco|hypernet):[^>]*>")


@dataclass(frozen=True)
class Style:
    """How a prompt is read.

    weights: whether brackets and BREAK have the meaning of this module, or are text. chunked: whether a long prompt is
    read in several chunks, or cut. clip_skip: the number of the text encoder's last layers to leave out.
    """

    weights: bool = True
    chunked: bool = True
    clip_skip: int | None = None


@dataclass(frozen=True)
class Prompt:
    """The input of an encoder: the prompt of one picture and how to read it.

    chunks: the least number of chunks, for prompts whose conditions must be equally long. sizes: see
    `networks.conditions`; None if unknown.
    """

    text: str
    style: Style = field(default_factory=Style)
    chunks: int = 1
    sizes: tuple[float, ...] | None = None


class Piece(NamedTuple):
    """A piece of a prompt that has one weight."""

    text: str
    weight: float


class Chunk(NamedTuple):
    """The token ids of one chunk and their weights, without start, end and padding."""

    ids: list[int]
    weights: list[float]


EMPTY = Chunk([], [])


class Reading(NamedTuple):
    """How a prompt is read: the number of tokens with start and end, of chunks, and of tokens that are cut.

    notes: what its writer may have meant otherwise.
    """

    tokens: int
    chunks: int
    cut: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reader:
    """A text encoder's vocabulary: the ids of a text, of start, end and padding, and the length of a chunk."""

    ids_of: Callable[[str], list[int]]
    start: int
    end: int
    pad: int
    length: int

    def chunks(self, prompt: str, style: Style) -> list[Chunk]:
        """The chunks of a prompt. Raises ConfigError for weights that are too large."""
        return chunks(prompt, style, self.ids_of, self.length - 2)

    def padded(self, prompt: str, style: Style, least: int) -> list[Chunk]:
        """The chunks to encode, at least `least` of them: only the first if the style cuts, then empty ones."""
        parts = self.chunks(prompt, style)
        parts = parts if style.chunked else parts[:1]
        return parts + [EMPTY] * (least - len(parts))

    def read(self, prompt: str, style: Style) -> Reading:
        """How a prompt is read. Raises ConfigError for weights that are too large."""
        parts = self.chunks(prompt, style)
        tokens = 2 + sum(len(chunk.ids) for chunk in parts)
        notes = notes_on(prompt) if style.weights else ()
        if style.chunked:
            return Reading(tokens, len(parts), 0, notes)
        return Reading(tokens, 1, tokens - 2 - len(parts[0].ids), notes)

    def ids(self, parts: Sequence[Chunk]) -> NDArray[np.int64]:
        """Token ids (n, L) of chunks, with start, end and padding."""
        rows = [[self.start, *chunk.ids, self.end] + [self.pad] * (self.length - 2 - len(chunk.ids)) for chunk in parts]
        return np.array(rows, np.int64)

    def weights(self, parts: Sequence[Chunk]) -> NDArray[np.float32]:
        """The weight of each token, (n, L, 1); start, end and padding have 1."""
        weights = np.ones((len(parts), self.length, 1), np.float32)
        for row, chunk in zip(weights, parts, strict=True):
            row[1 : 1 + len(chunk.weights), 0] = chunk.weights
        return weights


def check_no_clip_skip(style: Style) -> None:
    """Raises ConfigError if clip_skip is set, for models that read no hidden states of CLIP."""
    if style.clip_skip is not None:
        raise ConfigError("clip_skip has no effect on this model: it reads no hidden states of CLIP")


def check_clip_skip(style: Style, layers: int) -> None:
    """Raises ConfigError unless at least one of the layers remains."""
    if style.clip_skip is not None and not 0 <= style.clip_skip < layers:
        raise ConfigError(f"clip_skip must be from 0 to {layers - 1} for this model (got {style.clip_skip})")


def weighted(hidden: Array, empty: Array, weights: Array) -> Array:
    """Hidden states (n, L, D), each w times as far from the empty prompt's, (1, L, D): c = c_empty + w (c - c_empty).

    A weight of 1 changes nothing, to the bit; a weight of 0 removes a word.
    """
    return library(hidden).where(weights == 1, hidden, empty + weights * (hidden - empty))


def notes_on(prompt: str) -> tuple[str, ...]:
    """What the writer of a prompt may have meant otherwise: lone brackets, and what only A1111 reads."""
    notes = []
    alone = _parsed(prompt)[1]
    if alone:
        notes.append(f"{' '.join(alone)} without a partner is read as a character")
    plain = re.sub(r"\\.", "", prompt)
    for pattern, what in _OF_A1111.items():
        if match := re.search(pattern, plain):
            notes.append(f"{match[0][:40]!r} is read as text: {what} is not supported")
    return tuple(notes)


def parse(prompt: str) -> list[list[Piece]]:
    """The pieces of a prompt between its BREAKs. Raises ConfigError for weights that are too large."""
    pieces = _pieces(prompt)
    for piece in pieces:
        if not abs(piece.weight) <= LARGEST_WEIGHT:
            raise ConfigError(
                f"prompt: weights must be from {-LARGEST_WEIGHT:g} to {LARGEST_WEIGHT:g}"
                f" (got {piece.weight:g} for {piece.text[:30]!r})"
            )
    return _sections(pieces)


def has_weights(prompt: str) -> bool:
    """Whether brackets in a prompt give its words weights, of any size. Raises ConfigError for an adapter in it."""
    return any(piece.weight != 1 for piece in _pieces(prompt))


def _pieces(prompt: str) -> list[Piece]:
    """The pieces of a prompt. Raises ConfigError for an adapter in it."""
    if foreign := _ELSEWHERE.search(prompt):
        raise ConfigError(f"{foreign[0][:40]!r} in a prompt would be read as text. Name adapters by --lora")
    return _parsed(prompt)[0]


def _parsed(prompt: str) -> tuple[list[Piece], list[str]]:
    """The pieces of a prompt, and its brackets without a partner, which are pieces too."""
    pieces: list[Piece] = []
    opened: list[tuple[str, int]] = []  # the bracket, the first piece within
    alone: list[str] = []
    for match in _WORDS.finditer(prompt):
        word, weight = match[0], match[1]
        if word in "([":
            opened.append((word, len(pieces)))
        elif opened and opened[-1][0] + word[-1] in ("()", "[]") and (word in ")]" or weight is not None):
            _close(word[-1], float(weight) if weight else None, opened.pop()[1], pieces)
        else:
            alone += [word[-1]] if word in ")]" or weight is not None else []
            pieces.append(Piece(word[1:] if len(word) == 2 and word[0] == "\\" else word, 1.0))
    for bracket, first in reversed(opened):  # from the last one, so that places stay
        pieces.insert(first, Piece(bracket, 1.0))
        alone.append(bracket)
    return pieces, alone


def _close(bracket: str, weight: float | None, first: int, pieces: list[Piece]) -> None:
    """Multiply the weights of the pieces since the opening bracket."""
    if bracket == "]":
        weight = 1 / STRONGER
    for index, piece in enumerate(pieces[first:], first):
        pieces[index] = Piece(piece.text, piece.weight * (STRONGER if weight is None else weight))


def _sections(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Join neighbours of equal weight, so that weights of 1 leave the text unchanged, and cut at each BREAK."""
    joined: list[Piece] = []
    for piece in pieces:
        if joined and joined[-1].weight == piece.weight:
            joined[-1] = Piece(joined[-1].text + piece.text, piece.weight)
        else:
            joined.append(piece)
    sections: list[list[Piece]] = [[]]
    for piece in joined:
        first, *rest = _BREAK.split(piece.text)
        sections[-1].append(Piece(first, piece.weight))
        sections += [[Piece(text, piece.weight)] for text in rest]
    return sections


def chunks(prompt: str, style: Style, ids_of: Callable[[str], list[int]], size: int) -> list[Chunk]:
    """The chunks of a prompt, at least one, with at most `size` tokens each. A BREAK may end a chunk early."""
    sections = parse(prompt) if style.weights else [[Piece(prompt, 1.0)]]
    parts: list[Chunk] = []
    for section in sections:
        ids, weights = [], []
        for piece in section:
            some = ids_of(piece.text)
            ids += some
            weights += [piece.weight] * len(some)
        parts += [Chunk(ids[i : i + size], weights[i : i + size]) for i in range(0, max(len(ids), 1), size)]
    return parts
