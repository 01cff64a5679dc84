"""The classes of a data set: its captions, of which each picture has one."""

from __future__ import annotations

import re

from latentdiff.core.errors import DataError
from latentdiff.data.examples import Examples

MOST = 100_000


def classes_of(examples: Examples) -> list[str]:
    """The classes in the order of their names, in which numbers count as numbers. Raises DataError for too many."""
    captions = (examples.rule.possible(examples.pictures.captions(row)) for row in range(len(examples)))
    names = {name for possible in captions for name in possible or ()}
    names.discard("")
    what = f"{len(names):,} classes of {len(examples):,} pictures"
    if not names:
        raise DataError(f"{what}: no picture has a caption")
    if len(names) > MOST:
        raise DataError(f"{what}: at most {MOST:,} classes are supported")
    if len(names) > len(examples) / 2:
        why = "classes require two or more pictures on average"
        raise DataError(f"{what}: {why}. Put each in a folder of its name, data.pictures.layout = classes")
    return sorted(names, key=_in_order)


def _in_order(name: str) -> list[tuple[int, int, str]]:
    """A key by which "10" comes after "9"."""
    parts = re.findall(r"\d{1,18}|\D+|\d+", name)
    return [(0, int(part), "") if part.isdecimal() and len(part) < 19 else (1, 0, part) for part in parts]
