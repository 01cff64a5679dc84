"""A data set as a list of pictures, not yet opened, each with its captions.

Every layout (`folder.py`, `shards.py`, `table.py`) becomes a `Listing`; `layouts.py` recognises the layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from latentdiff.core.errors import ConfigError, DataError

CAPTION_KEYS = ("text", "caption", "prompt")  # tried in this order


@dataclass(frozen=True, slots=True)
class Record:
    """One listed picture: the user's name of it, a function that reads its bytes, and its captions.

    words: the caption if there is neither a caption nor an instance prompt.
    fault: why the picture cannot be used although its file may be readable.
    """

    name: str
    read: Callable[[], bytes]
    captions: tuple[str, ...] = ()
    repeats: int = 1
    words: str = ""
    fault: str = ""


@dataclass(frozen=True)
class Listing:
    """A listed data set. orphans: captions without a picture; notes: what else the user should know."""

    layout: str
    records: Iterable[Record]
    orphans: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    streamed: bool = False
    """Whether records hold their bytes and come in their own order only."""


@dataclass(frozen=True)
class Options:
    """The user's settings for a data set beside its path; None stands for the usual column."""

    layout: str = "auto"
    split: str = "train"
    image_column: str | None = None
    caption_column: str | None = None
    streaming: bool = False
    follow_links: bool = False


def captions_in(row: Mapping[str, Any], where: str, column: str | None = None) -> tuple[str, ...]:
    """The captions of a row, from a string or a list; null and white space do not count. Raises DataError."""
    key = column or next((name for name in CAPTION_KEYS if name in row), None)
    value = row.get(key) if key else None
    values = value if isinstance(value, list | tuple) else [value]
    for text in values:
        if text is not None and not isinstance(text, str):
            raise DataError(f"{where}: {key} must be a string or a list of strings (got {str(value)[:60]})")
    texts = [text for text in values if text and text.strip()]
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: {key} contains half a surrogate pair, which is not text") from None
    return tuple(text.strip() for text in texts)


def check_column(columns: Iterable[str], name: str | None, usual: Iterable[str], key: str, where: str) -> str | None:
    """The column to read: the user's, or the first usual one. Raises ConfigError, which lists the columns."""
    names = list(columns)
    chosen = name or next((column for column in usual if column in names), None)
    if name and name not in names:
        raise ConfigError(f'{where} has no column "{name}". Its columns: {", ".join(names)}. Name one with {key}')
    return chosen


def lines_of(data: bytes, where: str) -> list[str]:
    """Lines of UTF-8 text, with or without a byte order mark. Raises DataError with the number of a bad line."""
    lines = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            lines.append(line.decode("utf-8"))
        except UnicodeDecodeError:
            raise DataError(f"{where} line {number} is not valid UTF-8") from None
    return lines
