"""The words of captions, and the words of a prompt that a model has never seen, or only in captions of one thing."""

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


def words_of_one_thing(captions_of: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """Words that occur only in texts about one thing -> its name, except for a word that is the whole name.

    captions_of: the texts about each thing, by its name.
    """
    things: dict[str, list[str]] = {}
    for name, texts in captions_of.items():
        for word in words_of(texts):
            things.setdefault(word, []).append(name)
    return {word: names[0] for word, names in things.items() if len(names) == 1 and word != names[0].lower()}


def narrow(prompt: str, of_one: Mapping[str, str]) -> dict[str, str]:
    """The words of a prompt that belong to one thing alone, with its name, unless the prompt names the thing."""
    words = dict.fromkeys(word.lower() for word in _WORD.findall(prompt) if word != _BREAK)
    return {word: of_one[word] for word in words if word in of_one and not _names(prompt, of_one[word])}


def _names(prompt: str, thing: str) -> bool:
    """Whether a prompt has the whole name of a thing, or its plural."""
    stem, end = (thing[:-1], "(y|ies)") if thing.endswith("y") else (thing, "(e?s)?")
    return re.search(rf"(?<!\w){re.escape(stem)}{end}(?!\w)", prompt, re.IGNORECASE) is not None


def seen_things(things: Mapping[str, Iterable[str]], known: Set[str]) -> dict[str, tuple[str, ...]]:
    """The things, by category, all of whose words are known: training may never have shown the others."""
    seen = {category: tuple(name for name in names if not unseen(name, known)) for category, names in things.items()}
    return {category: names for category, names in seen.items() if names}
