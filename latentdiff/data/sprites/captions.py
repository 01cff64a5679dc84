"""Captions of composed scenes: everything that a description states, or a part of it, down to the bare noun.

Full captions teach most (Betker et al. 2023); shortened ones are what people type. All of them are true. A small
size and a named place are always stated, since whoever types "a cat" wants a large one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from latentdiff.data.scenes import BACKGROUNDS, COLORS, INVERSE, NUMBERS, PLACES, SHAPES, article
from latentdiff.data.sprites.description import Description, Group

Keep = Callable[[str], bool]
KEYWORDS = 4  # of a caption at most
_PLURALS = {"man": "men", "woman": "women", "person": "people", "mouse": "mice", "tooth": "teeth", "foot": "feet"}
_SAME = ("fish", "sheep", "deer", "bison", "squid", "shrimp", "aircraft", "scissors", "glasses", "series")


def captions(description: Description, rng: np.random.Generator) -> tuple[str, ...]:
    """The full caption, two shortened ones and the shortest, each once."""

    def some(_: str) -> bool:
        return bool(rng.random() < 0.5)

    always = {"place"} | ({"size"} if description.size == "small" else set())

    def stated(keep: Keep) -> Keep:
        return lambda part: keep(part) or part in always

    keeps: tuple[Keep, ...] = (lambda _: True, some, some, lambda _: False)
    return tuple(dict.fromkeys(sentence(description, stated(keep), rng) for keep in keeps))


def sentence(description: Description, keep: Keep, rng: np.random.Generator) -> str:
    """A caption with the parts that `keep` takes: article, size, color, relation, place, background, style, keywords.

    Number and colours stay in the categories that are about them.
    """
    text = _subject(description, keep, rng)
    if description.place is not None and keep("place"):
        text += f" {PLACES[description.place]}"
    if keep("background"):
        text += f" on {background(description.background)}"
    style = next((group.sprite.style for group in description.groups if group.sprite), "")
    if style and keep("style"):
        text += f", {style} style"
    if len(description.groups) == 1 and description.groups[0].sprite and keep("keywords"):
        text += "".join(f", {word}" for word in _keywords(description.groups[0], rng))
    return text


def frame() -> tuple[str, ...]:
    """The words of captions beside names, styles and keywords."""
    relations = [f"to the {relation}" for relation in INVERSE]
    sizes = ("small", "large", "a", "an", "and", "style")
    return (*COLORS, *NUMBERS.values(), *PLACES.values(), *relations, *sizes, *SHAPES, background([*BACKGROUNDS]))


def background(colors: Sequence[str]) -> str:
    """A background in words: "a blue background", "a red to blue background"."""
    words = " to ".join(colors)
    return f"{article(words)} {words} background"


def _keywords(group: Group, rng: np.random.Generator) -> list[str]:
    assert group.sprite
    words = [word for word in group.sprite.keywords if word not in group.name.split()]
    return [words[k] for k in sorted(rng.permutation(len(words))[:KEYWORDS])]


def _subject(description: Description, keep: Keep, rng: np.random.Generator) -> str:
    first, *rest = (_noun_phrase(group, description, keep, rng) for group in description.groups)
    if not rest:
        return first
    second, relation = rest[0], description.relation
    if not relation or not (description.category == "position" or keep("relation")):
        return f"{first} and {second}"
    if rng.random() < 0.3:  # the same fact seen from the other object
        first, second, relation = second, first, INVERSE[relation]
    if relation.endswith("of") and rng.random() < 0.5:
        relation = f"to the {relation}"
    return f"{first} {relation} {second}"


def _noun_phrase(group: Group, description: Description, keep: Keep, rng: np.random.Generator) -> str:
    about_color = group.is_recolored or group.sprite is None or description.category in ("colors", "binding")
    words = [description.size] if description.size and keep("size") else []
    if group.color and not {*COLORS, "brown"} & {*group.name.split()} and (about_color or keep("color")):
        words.append(group.color)
    if group.count > 1:
        number = str(group.count) if rng.random() < 0.2 else NUMBERS[group.count]
        return " ".join([number, *words, plural(group.name)])
    phrase = " ".join([*words, group.name])
    several = len(description.groups) > 1
    return f"{article(phrase)} {phrase}" if (several or keep("article")) and not _is_plural(group.name) else phrase


def _is_plural(name: str) -> bool:
    last = name.split()[-1]
    return last in _PLURALS.values() or (last.endswith("s") and not last.endswith(("ss", "us", "is")))


def plural(name: str) -> str:
    """The plural of a name, of its last word before "of" or "with"."""
    words = name.split()
    end = next((k for k, word in enumerate(words) if k and word in ("of", "with", "in", "on")), len(words))
    head = words[end - 1]
    if head in _PLURALS:
        head = _PLURALS[head]
    elif head.endswith(_SAME) or _is_plural(head):
        pass
    elif head.endswith(("s", "x", "ch", "sh", "z")):
        head += "es"
    elif head.endswith("y") and head[-2:-1] not in "aeiou":
        head = f"{head[:-1]}ies"
    elif head.endswith(("af", "lf")):
        head = f"{head[:-1]}ves"
    else:
        head += "s"
    return " ".join([*words[: end - 1], head, *words[end:]])
