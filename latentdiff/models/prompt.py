r"""A prompt as people write it: weights, breaks, any length -> chunks of token ids with a weight each.

    (word)      1.1 times the attention        (word:1.3)    1.3 times        [word]    1 / 1.1 times
    BREAK       what follows begins a new chunk               \( \) \[ \] \\   the character itself

Weights of nested brackets multiply. A chunk is what a text encoder reads at once: a start, up to 75 tokens, an end.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from latentdiff.errors import ConfigError

STRONGER = 1.1
LARGEST_WEIGHT = 10.0
_WORDS = re.compile(r"\\[\\()\[\]]|:\s*([-+]?(?:\d+\.?\d*|\.\d+))\s*\)|[()\[\]]|[^\\()\[\]:]+|[\\:]")
_BREAK = re.compile(r"\bBREAK\b")
_ELSEWHERE = re.compile(r"<(lora|lyco|hypernet):[^>]*>")


@dataclass(frozen=True)
class Style:
    """How a prompt is read.

    weights: brackets and BREAK mean what this module says; else they are text. chunked: a prompt longer than a chunk
    is read in several; else it is cut. clip_skip: how many of the text encoder's last layers are left out.
    """

    weights: bool = True
    chunked: bool = True
    clip_skip: int | None = None


class Piece(NamedTuple):
    """Text of one weight."""

    text: str
    weight: float


class Chunk(NamedTuple):
    """Token ids of one reading with the weight of each, without start, end and padding."""

    ids: list[int]
    weights: list[float]


def parse(prompt: str) -> list[list[Piece]]:
    """The pieces of a prompt between its BREAKs. Raises ConfigError for brackets that do not close."""
    if foreign := _ELSEWHERE.search(prompt):
        raise ConfigError(f"prompt holds {foreign[0][:40]!r}, which would be text here. Name adapters by --lora")
    pieces: list[Piece] = []
    opened: list[tuple[str, int, int]] = []  # the bracket, its place in the prompt, the first piece within
    for match in _WORDS.finditer(prompt):
        word, weight = match[0], match[1]
        if word in "([":
            opened.append((word, match.start(), len(pieces)))
        elif word in ")]" or (weight is not None and opened and opened[-1][0] == "("):
            _close(word[-1], float(weight) if weight else None, match.start(), opened, pieces)
        else:
            pieces.append(Piece(word[1:] if len(word) == 2 and word[0] == "\\" else word, 1.0))
    if opened:
        raise _unbalanced(*opened[-1][:2])
    return _sections(pieces)


def _close(
    bracket: str, weight: float | None, place: int, opened: list[tuple[str, int, int]], pieces: list[Piece]
) -> None:
    """Weigh the pieces since the bracket that this one closes."""
    if not opened or opened[-1][0] + bracket not in ("()", "[]"):
        raise _unbalanced(bracket, place)
    _, _, first = opened.pop()
    if bracket == "]":
        weight = 1 / STRONGER
    for index, piece in enumerate(pieces[first:], first):
        combined = piece.weight * (STRONGER if weight is None else weight)
        if not abs(combined) <= LARGEST_WEIGHT:
            raise ConfigError(f"prompt: a weight of {combined:g} is over {LARGEST_WEIGHT:g} ({piece.text[:30]!r})")
        pieces[index] = Piece(piece.text, combined)


def _unbalanced(bracket: str, place: int) -> ConfigError:
    return ConfigError(
        rf"prompt: {bracket} at character {place + 1} has no partner. Write \{bracket} for the character"
    )


def _sections(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Neighbours of equal weight joined, so that a weight of 1 leaves the text as it was; then cut at each BREAK."""
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
    """The chunks of a prompt, of at most `size` tokens each; a section's last may be short. At least one."""
    sections = parse(prompt) if style.weights else [[Piece(prompt, 1.0)]]
    found: list[Chunk] = []
    for section in sections:
        ids, weights = [], []
        for piece in section:
            some = ids_of(piece.text)
            ids += some
            weights += [piece.weight] * len(some)
        found += [Chunk(ids[i : i + size], weights[i : i + size]) for i in range(0, max(len(ids), 1), size)]
    return found
