"""A survey of a whole data set before training: every picture is decoded, every caption assigned.

A picture's identity is the sha256 of its encoded bytes, whatever its name and place. The set is in the order of
identities, so the same pictures in another layout are the same set, row by row.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import PIL
from tqdm.auto import tqdm

from latentdiff.core.decoding import MAX_PIXELS, WHITE, decode, silent_decoders
from latentdiff.core.errors import DataError, ResourceError
from latentdiff.core.files import write_text
from latentdiff.core.text import printable
from latentdiff.data.buckets import Size
from latentdiff.data.memo import read_memo, write_memo
from latentdiff.data.source import Listing, Record

_RULES = f"2, Pillow {PIL.__version__}"  # the facts below depend on these and on the bytes
QUARANTINED = '{"name": '  # how lines about faults begin
_AT_ONCE = 256  # pictures in memory: a stream's hold their bytes


@dataclass(frozen=True, slots=True)
class Facts:
    """The result of decoding: upright size, colour mode, format, frames, or why a picture cannot be used."""

    size: Size = (0, 0)
    mode: str = ""
    format: str = ""
    is_animated: bool = False
    fault: str = ""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that can be used."""

    id: str
    name: str
    facts: Facts
    captions: tuple[str, ...]
    repeats: int
    read: Callable[[], bytes]


@dataclass(frozen=True, slots=True)
class Fault:
    """A picture that cannot be used, and why."""

    name: str
    reason: str
    id: str | None = None

    def __str__(self) -> str:
        return f"{printable(self.name)} ({self.reason})"


@dataclass(frozen=True)
class Survey:
    """The result: each listed picture is in exactly one of `pictures`, `unreadable`, `ambiguous`, `uncaptioned`."""

    listing: Listing
    pictures: tuple[Picture, ...]
    unreadable: tuple[Fault, ...]
    ambiguous: tuple[Fault, ...]
    uncaptioned: tuple[Fault, ...]

    @property
    def count(self) -> int:
        """The number of listed pictures."""
        return len(self.pictures) + len(self.quarantined)

    @cached_property
    def quarantined(self) -> tuple[Fault, ...]:
        """All pictures that cannot be used."""
        return (*self.unreadable, *self.ambiguous, *self.uncaptioned)

    @cached_property
    def duplicates(self) -> dict[str, list[str]]:
        """Names of pictures with the same bytes, by identity."""
        names: dict[str, list[str]] = defaultdict(list)
        for picture in self.pictures:
            names[picture.id].append(picture.name)
        return {key: same for key, same in names.items() if len(same) > 1}

    def refusal(self) -> str | None:
        """Why training refuses this set, in one line; None if it does not."""
        total, orphans = self.count, len(self.listing.orphans)
        reasons = [
            _named(self.unreadable, 20, f"{len(self.unreadable)} of {total:,} images cannot be read"),
            _named(self.uncaptioned, 5, f"{_count(len(self.uncaptioned), *_HAVE)} no caption", names_only=True),
            _named(self.ambiguous, 5, f"{_count(len(self.ambiguous), *_HAVE)} captions that are ambiguous"),
            _named(self.listing.orphans, 5, f"{_count(orphans, 'caption has', 'captions have')} no image"),
        ]
        texts = [reason for reason in reasons if reason]
        if not texts:
            return None if self.pictures else "no images can be used"
        alone = bool(self.uncaptioned) and len(texts) == 1
        advice = "Add rows or pass --allow-missing-captions" if alone else "Mend them or pass --skip-bad"
        return f"{'; '.join(texts)}. {advice}"

    def accepted(self, skip_bad: bool) -> Survey:
        """The survey if training may use it; skip_bad: leave out what cannot be used. Raises DataError."""
        refusal = self.refusal()
        if refusal and not (skip_bad and self.pictures):
            raise DataError(refusal)
        return self

    @property
    def left_out(self) -> bool:
        """Whether anything is left out."""
        return bool(self.quarantined or self.listing.orphans)

    def write_quarantine(self, path: Path) -> None:
        """Write one JSON object a line for everything left out. The pictures themselves are not touched."""
        lines = [asdict(fault) for fault in self.quarantined]
        lines += [{"name": name, "reason": "a caption without an image", "id": None} for name in self.listing.orphans]
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def survey(
    listing: Listing,
    *,
    instance_prompt: str | None = None,
    allow_missing_captions: bool = False,
    max_pixels: int = MAX_PIXELS,
    memo: Path | None = None,
) -> Survey:
    """Open every picture of a listing. instance_prompt: the caption of pictures without one.

    memo: a file that remembers the facts by identity, so that the next survey only hashes bytes.
    """
    rules = {"rules": _RULES, "max_pixels": max_pixels}
    known = {key: facts_of(texts) for key, texts in (read_memo(memo, rules) if memo else ())}
    pictures: list[Picture] = []
    faults: dict[str, list[Fault]] = {"unreadable": [], "ambiguous": [], "uncaptioned": []}
    for record, key, facts in _opened(listing.records, known, max_pixels):
        captions = record.captions or tuple(filter(None, [instance_prompt or record.words]))
        if facts.fault:
            faults["unreadable"].append(Fault(record.name, facts.fault, key))
        elif record.fault:
            faults["ambiguous"].append(Fault(record.name, record.fault, key))
        elif not captions and not allow_missing_captions:
            faults["uncaptioned"].append(Fault(record.name, "no caption", key))
        else:
            assert key
            pictures.append(Picture(key, record.name, facts, captions or ("",), record.repeats, record.read))
    if memo:
        write_memo(memo, rules, [[key, asdict(facts)] for key, facts in sorted(known.items())])
    # names come last: training must not depend on them
    pictures.sort(key=lambda picture: (picture.id, picture.captions, picture.repeats, picture.name))
    return Survey(listing, tuple(pictures), **{kind: tuple(members) for kind, members in faults.items()})


def _opened(
    records: Iterable[Record], known: dict[str, Facts], max_pixels: int
) -> Iterator[tuple[Record, str | None, Facts]]:
    """Each record with its identity and facts, by one thread a core: decoders release Python's lock."""

    def look(record: Record) -> tuple[Record, str | None, Facts]:
        try:
            data = record.read()
        except (DataError, OSError) as error:
            return record, None, Facts(fault=str(error))
        key = hashlib.sha256(data).hexdigest()
        if key not in known:
            try:
                known[key] = _facts(data, max_pixels)
            except MemoryError:
                raise ResourceError(f"out of memory while decoding {record.name}. Lower max_pixels") from None
        return record, key, known[key]

    remaining, total = iter(records), len(records) if isinstance(records, list) else None
    bar = tqdm(total=total, desc="looking", unit="image", disable=None)
    with ThreadPoolExecutor(os.cpu_count()) as pool, silent_decoders(), bar:
        while some := list(itertools.islice(remaining, _AT_ONCE)):
            yield from pool.map(look, some)
            bar.update(len(some))


def facts_of(texts: dict[str, Any]) -> Facts:
    """Facts from JSON."""
    height, width = texts["size"]
    return Facts(**{**texts, "size": (height, width)})


def _facts(data: bytes, max_pixels: int) -> Facts:
    try:
        decoded = decode(data, WHITE, max_pixels)
    except DataError as error:
        return Facts(fault=str(error))
    height, width = decoded.pixels.shape[:2]
    return Facts((height, width), decoded.mode, decoded.format, decoded.is_animated)


def as_values(survey: Survey) -> list[Any]:
    """A survey as JSON values, so that a stream need not be read again for it."""
    values: list[Any] = [
        [picture.id, picture.name, asdict(picture.facts), picture.captions, picture.repeats]
        for picture in survey.pictures
    ]
    kinds = {"unreadable": survey.unreadable, "ambiguous": survey.ambiguous, "uncaptioned": survey.uncaptioned}
    return values + [[kind, asdict(fault)] for kind, faults in kinds.items() for fault in faults]


def from_values(listing: Listing, values: list[Any]) -> Survey:
    """The inverse of `as_values`."""
    pictures = []
    faults: dict[str, list[Fault]] = {"unreadable": [], "ambiguous": [], "uncaptioned": []}
    for first, *rest in values:
        if first in faults:
            faults[first].append(Fault(**rest[0]))
        else:
            name, facts, captions, repeats = rest
            pictures.append(Picture(first, name, facts_of(facts), tuple(captions), repeats, _streamed))
    return Survey(listing, tuple(pictures), **{kind: tuple(members) for kind, members in faults.items()})


def _streamed() -> bytes:
    raise DataError("a streamed picture can only be read with its stream")


_HAVE = "image has", "images have"


def _count(number: int, one: str, many: str) -> str:
    return f"1 {one}" if number == 1 else f"{number:,} {many}"


def _named(faults: tuple[Any, ...], most: int, what: str, names_only: bool = False) -> str:
    """`what: the first few by name`; empty without any."""
    if not faults:
        return ""
    named = ", ".join(printable(fault.name) if names_only else str(fault) for fault in faults[:most])
    return f"{what}: {named}" + (f", ... ({len(faults) - most} more)" if len(faults) > most else "")
