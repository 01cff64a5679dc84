"""What a composed scene shows: objects with colours, numbers, relations, places, and a background.

A description is complete: captions state all of it or a part (`captions.py`), a layout satisfies it (`scene.py`).
The categories are those of GenEval (Ghosh et al. 2023).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from latentdiff.data.scenes import BACKGROUNDS, COLORS, HELD_OUT, INVERSE, PAIRS, PLACES, RELATIONS, SHAPES
from latentdiff.data.sprites.library import Library, Sprite

GROUNDS = BACKGROUNDS | COLORS
MOST = 4  # objects of a scene
_COLOR_HELD_OUT = 8  # one in so many pairs of a name and a colour not its own is never drawn in training
_SIZES = ("small", "", "large")
_SHARES = (0.08, 0.62, 0.3)  # of the sizes; what a thing looks like is learnt where it is large
_PLACED = 0.15  # the share of single things at a named place, where they are small too
_OF_COLORS = ("colors", "binding")
_TRIES = 100  # for a second object of the first one's style; then it is a shape


@dataclass(frozen=True)
class Group:
    """`count` equal objects: a sprite or, without one, a shape. color: "" for a sprite of no main colour."""

    sprite: Sprite | None
    name: str
    color: str
    count: int = 1

    @property
    def is_recolored(self) -> bool:
        """Whether a sprite is drawn in another colour than its own."""
        return self.sprite is not None and self.color != self.sprite.color


@dataclass(frozen=True)
class Description:
    """See the module.

    relation holds between the first and the second group. place is the cell of a 3 x 3 grid, (-1..1, -1..1), x to the
    right, y down; None is anywhere. background is a colour, or two for a gradient.
    """

    category: str
    groups: tuple[Group, ...]
    background: tuple[str, ...]
    relation: str = ""
    place: tuple[int, int] | None = None
    size: str = ""


def is_held_out(group: Group, library: Library) -> bool:
    """Whether training never draws it: a shape or a sprite in this colour, or a sprite of this name in this style."""
    if group.sprite is None:
        return (group.name, group.color) in HELD_OUT
    return group.sprite.row in library.held_out or (group.is_recolored and _is_held_out(group.name, group.color))


def _is_held_out(name: str, color: str) -> bool:
    digest = hashlib.sha256(f"{name} {color}".encode()).digest()
    return int.from_bytes(digest[:8], "little") % _COLOR_HELD_OUT == 0


@dataclass(frozen=True)
class Describer:
    """Draws descriptions. shapes: the share of groups that are shapes; held_out: whether each has a held-out group."""

    library: Library
    shapes: float = 0.1
    held_out: bool = False

    @cached_property
    def _rows(self) -> dict[tuple[str, bool], np.ndarray]:
        """Rows by what a category requires of them and by whether they are held out."""
        kinds: dict[str, Callable[[Sprite], bool]] = {
            "any": lambda sprite: True,
            "countable": lambda sprite: sprite.countable,
            "colored": lambda sprite: sprite.countable and sprite.color != "",
        }
        sprites, held = self.library.sprites, self.library.held_out
        return {
            (kind, side): np.array([s.row for s in sprites if fits(s) and (s.row in held) == side], int)
            for kind, fits in kinds.items()
            for side in (False, True)
        }

    def describe(self, rng: np.random.Generator, category: str) -> Description:
        """A description of one category."""
        groups = self._groups(rng, category)
        description = Description(category, groups, self._background(rng, groups))
        if category == "single":
            place = list(PLACES)[rng.integers(len(PLACES))] if rng.random() < _PLACED else None
            return replace(description, place=place, size="" if place else str(rng.choice(_SIZES, p=_SHARES)))
        if category == "position" or (category in ("two", "binding") and rng.random() < 0.4):
            return replace(description, relation=RELATIONS[rng.integers(len(RELATIONS))])
        return description

    def _groups(self, rng: np.random.Generator, category: str) -> tuple[Group, ...]:
        """One object, several alike, or two different ones of one style."""
        first = self._group(rng, category, held_out=self.held_out)
        if category == "counting":
            return (replace(first, count=int(rng.integers(2, MOST + 1))),)
        if category in ("single", "colors"):
            return (first,)
        for _ in range(_TRIES):
            second = self._group(rng, category)
            if _differ(first, second, category):
                return (first, second)
        others = [pair for pair in PAIRS if pair[1] != first.color]
        return (first, Group(None, *others[rng.integers(len(others))]))

    def _group(self, rng: np.random.Generator, category: str, *, held_out: bool = False) -> Group:
        """One object, in any colour if the category is about colours, else in its own."""
        turn = category in _OF_COLORS
        kind = "colored" if turn else "any" if category == "single" else "countable"
        rows = self._rows[kind, held_out and not turn]
        while True:
            color = list(COLORS)[rng.integers(len(COLORS))]
            if not len(rows) or rng.random() < self.shapes:
                group = Group(None, SHAPES[rng.integers(len(SHAPES))], color)
            else:
                sprite = self.library.draw(rng, rows)
                group = Group(sprite, sprite.name, color if turn else sprite.color)
            if is_held_out(group, self.library) == held_out:
                return group

    def _background(self, rng: np.random.Generator, groups: tuple[Group, ...]) -> tuple[str, ...]:
        """White in 45 %, one colour in 40 %, a gradient in 15 % of scenes; never the colour of an object."""
        taken = {group.color for group in groups}
        names = [name for name in GROUNDS if name not in taken]
        kind = rng.random()
        if kind < 0.45 and "white" in names:
            return ("white",)
        first, last = rng.choice(names, 2, replace=False)
        return (str(first),) if kind < 0.85 else (str(first), str(last))

    def twin(self, description: Description, rng: np.random.Generator) -> Description:
        """The same scene with one fact changed, a hard negative for contrastive training; nothing held out."""
        changed = self._changed(description, rng)
        held = any(is_held_out(group, self.library) for group in changed.groups)
        return self.describe(rng, description.category) if held else changed

    def _changed(self, description: Description, rng: np.random.Generator) -> Description:
        first, *rest = description.groups
        if description.relation:
            return replace(description, relation=INVERSE[description.relation])
        if rest and description.category == "binding":
            second = rest[0]
            return replace(description, groups=(replace(first, color=second.color), replace(second, color=first.color)))
        if description.category == "colors":
            colors = [color for color in COLORS if color != first.color and color not in description.background]
            return replace(description, groups=(replace(first, color=str(rng.choice(colors))),))
        if first.count > 1:
            count = int(rng.choice([n for n in range(2, MOST + 1) if n != first.count]))
            return replace(description, groups=(replace(first, count=count),))
        if description.place is not None and rng.random() < 0.5:
            cells = [cell for cell in PLACES if cell != description.place]
            return replace(description, place=cells[rng.integers(len(cells))])
        others = [s for s in self.library.by_name.get(first.name, ()) if first.sprite and s.style != first.sprite.style]
        if others and not first.is_recolored:
            other = others[rng.integers(len(others))]
            return replace(description, groups=(Group(other, other.name, other.color), *rest))
        grounds = (self._background(rng, description.groups) for _ in itertools.count())
        return replace(description, background=next(g for g in grounds if g != description.background))


def _differ(first: Group, second: Group, category: str) -> bool:
    """Whether two objects make a scene: different things of one style, in different colours if it is about colours."""
    one_style = not (first.sprite and second.sprite) or first.sprite.style == second.sprite.style
    return one_style and first.name != second.name and (category not in _OF_COLORS or first.color != second.color)
