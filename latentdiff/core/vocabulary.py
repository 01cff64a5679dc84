"""The words of captions, and the words of a prompt that a model has never seen in one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Set

_WORD = re.compile(r"[^\W\d_]+")
_BREAK = "BREAK"  # of prompts in chunks, see networks/encoders/prompt.py


def words_of(texts: Iterable[str]) -> frozenset[str]:
    """The words of texts, runs of letters in lower case."""
    return frozenset(word.lower() for text in texts for word in _WORD.findall(text))


def unseen(prompt: str, known: Set[str]) -> list[str]:
    """The words of a prompt that are not among the known ones, each once, in order."""
    words = [word for word in _WORD.findall(prompt) if word != _BREAK]
    return list(dict.fromkeys(word.lower() for word in words if word.lower() not in known))


def seen_things(things: Mapping[str, Iterable[str]], known: Set[str]) -> dict[str, tuple[str, ...]]:
    """The things, by category, all of whose words are known: training may never have drawn the others."""
    seen = {category: tuple(name for name in names if not unseen(name, known)) for category, names in things.items()}
    return {category: names for category, names in seen.items() if names}
