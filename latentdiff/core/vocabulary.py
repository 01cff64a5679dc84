"""The words of captions, and the words of a prompt that a model has never seen in one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Set

_WORD = re.compile(r"[^\W\d_]+")
_BREAK = "BREAK"  # of prompts in chunks, see networks/encoders/prompt.py


def words_of(texts: Iterable[str]) -> frozenset[str]:
    """The words of texts, runs of letters in lower case."""
    return frozenset(word.lower() for text in texts for word in _WORD.findall(text))


def unseen(prompt: str, known: Set[str]) -> list[str]:
    """The words of a prompt that are not among the known ones, each once, in order."""
    words = [word for word in _WORD.findall(prompt) if word != _BREAK]
    return list(dict.fromkeys(word.lower() for word in words if word.lower() not in known))
