"""The report of a data set, as lines for a terminal, as values for a machine, as sections of a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

from latentdiff.core.text import printable
from latentdiff.data.buckets import Size, cropped_share, nearest
from latentdiff.data.survey import Picture, Survey
from latentdiff.evaluation.report.page import Entry

_NAMED = 8  # entries without faults; faults are listed completely


def sections(
    survey: Survey, source: str, table: Sequence[Size], max_tokens: int, tokens: Callable[[list[str]], list[int]]
) -> list[Entry]:
    """The sections of a survey's report; tokens: counts a caption's tokens, with start and end."""
    left = len(survey.quarantined)
    images = f"{survey.count:,} = {len(survey.pictures):,} that can be used + {left:,} that cannot"
    rows = sum(picture.repeats for picture in survey.pictures)
    return [
        Entry("data set", f"{printable(source)}: {survey.listing.layout}", tuple(survey.listing.notes)),
        Entry("images", images + (f"; {rows:,} samples an epoch" if rows != len(survey.pictures) else "")),
        *_faults(survey),
        _captions(survey, max_tokens, tokens),
        _duplicates(survey),
        *_kinds(survey),
        *_geometry(survey.pictures, table),
    ]


def summary(survey: Survey, source: str) -> dict[str, Any]:
    """The numbers of a survey, and every fault with its reason, as JSON values."""
    return {
        "source": source,
        "layout": survey.listing.layout,
        "images": survey.count,
        "usable": len(survey.pictures),
        "samples": sum(picture.repeats for picture in survey.pictures),
        "captions": len({caption for picture in survey.pictures for caption in picture.captions}),
        "duplicates": sum(map(len, survey.duplicates.values())),
        "unusable": [asdict(fault) for fault in survey.quarantined],
        "captions_without_an_image": list(survey.listing.orphans),
        "refused": survey.refusal(),
    }


def _faults(survey: Survey) -> list[Entry]:
    kinds: dict[str, Iterable[Any]] = {
        "cannot be read": survey.unreadable,
        "no caption": survey.uncaptioned,
        "captions that are ambiguous": survey.ambiguous,
        "captions without an image": survey.listing.orphans,
    }
    return [
        Entry(title, f"{len(lines):,}", lines)
        for title, lines in ((title, tuple(map(str, faults))) for title, faults in kinds.items())
        if lines
    ]


def _captions(survey: Survey, max_tokens: int, tokens: Callable[[list[str]], list[int]]) -> Entry:
    distinct = list(dict.fromkeys(caption for picture in survey.pictures for caption in picture.captions))
    lengths = dict(zip(distinct, tokens(distinct), strict=True))
    cut = [p for p in survey.pictures if any(lengths[caption] > max_tokens for caption in p.captions)]
    several, empty = (sum(test(p) for p in survey.pictures) for test in (_has_several, _has_none))
    text = f"{len(distinct):,} distinct"
    if lengths:
        ordered = sorted(lengths.values())
        text += f", {ordered[0]} to {ordered[-1]} tokens, median {ordered[len(ordered) // 2]}"
    text += f"; {len(cut):,} images with a caption cut at {max_tokens} tokens"
    text += f"; {several:,} images with several" if several else ""
    text += f"; {empty:,} images with none" if empty else ""
    longest = sorted(cut, key=lambda picture: -max(lengths[caption] for caption in picture.captions))
    lines = [f"{printable(p.name)}: {max(lengths[caption] for caption in p.captions):,} tokens" for p in longest]
    return Entry("captions", text, _first(lines))


def _has_several(picture: Picture) -> bool:
    return len(picture.captions) > 1


def _has_none(picture: Picture) -> bool:
    return picture.captions == ("",)


def _duplicates(survey: Survey) -> Entry:
    groups = survey.duplicates
    images, several = sum(map(len, groups.values())), "s" if len(groups) > 1 else ""
    text = f"{images:,} images in {len(groups):,} group{several} of the same bytes" if groups else "none"
    return Entry("duplicates", text, _first([", ".join(_first(list(map(printable, g)))) for g in groups.values()]))


def _kinds(survey: Survey) -> list[Entry]:
    facts = [picture.facts for picture in survey.pictures]
    moving = [printable(picture.name) for picture in survey.pictures if picture.facts.is_animated]
    kinds = [
        Entry("colour modes", _counted(fact.mode for fact in facts)),
        Entry("formats", _counted(fact.format for fact in facts)),
    ]
    if moving:
        kinds.append(Entry("animations", f"{len(moving):,}, of which the first frame is used", _first(moving)))
    return kinds


def _geometry(pictures: Sequence[Picture], table: Sequence[Size]) -> list[Entry]:
    """Sizes, the bucket table, and the share of pixels that is cropped away, with all pictures at one scale."""
    if not pictures:
        return []
    buckets = [nearest(picture.facts.size, table) for picture in pictures]
    lost = [cropped_share(picture.facts.size, bucket) for picture, bucket in zip(pictures, buckets, strict=True)]
    tiny = [
        f"{printable(picture.name)}: {_size(picture.facts.size)}, bucket {_size(bucket)}"
        for picture, bucket in zip(pictures, buckets, strict=True)
        if picture.facts.size[0] < bucket[0] or picture.facts.size[1] < bucket[1]
    ]
    areas = sorted((picture.facts.size for picture in pictures), key=lambda size: size[0] * size[1])
    sizes = f"{_size(areas[0])} to {_size(areas[-1])}, median {_size(areas[len(areas) // 2])}"
    lines = []
    for size in table:
        shares = [share for share, bucket in zip(lost, buckets, strict=True) if bucket == size]
        if shares:
            away = sum(shares) / len(shares)
            lines.append(f"{_size(size):>9}  {len(shares):>7,} images, {away:6.1%} cropped away")
    used = f"{len(lines)} of {len(table)} used; {sum(lost) / len(lost):.1%} cropped away"
    return [
        Entry("sizes", sizes),
        Entry("tiny", f"{len(tiny):,} smaller than their bucket: enlarged", _first(tiny)),
        Entry("buckets", used, tuple(lines)),
    ]


def _size(size: Size) -> str:
    return f"{size[1]}x{size[0]}"


def _counted(names: Iterable[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in Counter(names).most_common()) or "none"


def _first(lines: Sequence[str]) -> tuple[str, ...]:
    more = [f"... and {len(lines) - _NAMED:,} more"] if len(lines) > _NAMED else []
    return (*lines[:_NAMED], *more)


def as_lines(survey: Sequence[Entry]) -> list[str]:
    """The report for a terminal."""
    width = max(len(section.title) for section in survey) + 2
    lines = []
    for section in survey:
        lines.append(f"{section.title:<{width}}{section.text}")
        lines += [f"{'':<{width}}  {line}" for line in section.lines]
    return lines
