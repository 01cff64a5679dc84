"""Tables of pictures, read by Hugging Face's `datasets`: saved sets, parquet files, hub ids; whole or streamed.

Pictures keep their encoded bytes, so a picture has the same identity in a table and in a file of its own. A hub id is
fetched because the user named it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from types import NoneType
from typing import Any

from latentdiff.core.errors import ConfigError, DataError, LatentDiffError, raised_as
from latentdiff.data.inside import named_inside
from latentdiff.data.local_table import open_table
from latentdiff.data.source import CAPTION_KEYS, Listing, Options, Record, captions_in, check_column


def state_of(source: str) -> list[Any]:
    """The state of a table on this machine: its files with their sizes and times."""
    path = Path(source)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    stats = ((str(file), file.stat()) for file in files if file.is_file())
    return [[name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in stats]


def listing(source: str, options: Options) -> Listing:
    """A listing of every row. Raises DataError, and ConfigError for a missing column or split."""
    table = _opened(source, options)
    with raised_as(DataError, f"cannot read the data set {source}"):
        columns = list(table.features or next(iter(table.take(1)), {}))
    image = check_column(columns, options.image_column, ("image", "img", "jpg", "png"), "image_column", source)
    if image is None:
        raise ConfigError(f"{source} has no column image. Its columns: {', '.join(columns)}. Use image_column")
    caption = check_column(columns, options.caption_column, CAPTION_KEYS, "caption_column", source)
    table = _undecoded(table.select_columns([image, *([caption] if caption else [])]), image, caption)
    root = _root(source)
    if options.streaming:
        return Listing("table", _Stream(source, table, image, caption, root), streamed=True)
    captions = table[caption] if caption else [None] * len(table)
    records = []
    for number, text in enumerate(captions):
        own = captions_in({"text": text}, f"{source} row {number}")
        records.append(Record(f"row {number}", _reader(table, number, image, root), own))
    if not records:
        raise DataError(f"no rows in {source}")
    return Listing("table", records, notes=_other_splits(table))


def _root(source: str) -> Path | None:
    """The folder whose files a row may name; a row of a hub's table may name none."""
    path = Path(source)
    return path if path.is_dir() else path.parent if path.is_file() else None


def _other_splits(table: Any) -> tuple[str, ...]:
    others = sorted(str(name) for name in table.info.splits or () if str(name) != str(table.split))
    return (f"other splits are not read: {', '.join(others)}",) if others else ()


class _Stream:
    """Records in the order of the rows, each with its bytes; it can be read several times."""

    def __init__(
        self, source: str, table: Iterable[dict[str, Any]], image: str, caption: str | None, root: Path | None
    ):
        self._source, self._table, self._image, self._caption, self._root = source, table, image, caption, root

    def __iter__(self) -> Iterator[Record]:
        for number, row in enumerate(self._rows()):
            captions = captions_in({"text": row[self._caption] if self._caption else None}, f"row {number}")
            yield Record(f"row {number}", partial(_bytes, row[self._image], self._root), captions)

    def _rows(self) -> Iterator[dict[str, Any]]:
        rows = iter(self._table)
        while True:
            with raised_as(DataError, f"cannot read the data set {self._source}"):
                row = next(rows, None)
            if row is None:
                return
            yield row


def _opened(source: str, options: Options) -> Any:
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    # without a network it prints each of five retries; our error names the reason
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    path = Path(source)
    try:
        if path.exists():
            return open_table(path, options)
        return load_dataset(source, split=options.split, streaming=options.streaming)
    except LatentDiffError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        what = f"cannot read the data set {source}" if path.exists() else f"no {source} here, nor on the hub"
        raise DataError(f"{what} ({reason})") from None


def _undecoded(table: Any, image: str, caption: str | None) -> Any:
    """The columns as they lie in the file: a decoder of `datasets` opens any file or address that a cell names."""
    from datasets import Image, LargeList, List, Value

    features = table.features or {}
    if isinstance(feature := features.get(image), Image):
        table = table.cast_column(image, Image(decode=False))
    elif not isinstance(feature, Value | dict | NoneType):
        raise ConfigError(f"column {image} holds {type(feature).__name__}, not pictures. Use image_column")
    text = features.get(caption) if caption else None
    if isinstance(text, List | LargeList):
        text = text.feature
    if not isinstance(text, Value | NoneType):
        raise ConfigError(f"column {caption} holds {type(text).__name__}, not text. Use caption_column")
    return table


def _reader(table: Any, number: int, column: str, root: Path | None) -> Callable[[], bytes]:
    return lambda: _bytes(table[number][column], root)


def _bytes(cell: Any, root: Path | None) -> bytes:
    """The bytes of a cell, or of the file in the table's folder that it names."""
    name = cell.get("path") if isinstance(cell, dict) else cell
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if isinstance(content, bytes) and content:
        return content
    if not name:
        raise DataError("no picture")
    if root is None or not isinstance(name, str):
        raise DataError(f"not bytes of a picture but {str(name)[:60]}")
    path = root / named_inside(PurePosixPath(), name, "the row")
    if not path.is_file():
        raise DataError(f"not bytes of a picture but {name[:60]}")
    if not path.resolve().is_relative_to(root.resolve()):
        raise DataError(f"the row names a link out of the data set ({name[:60]})")
    return path.read_bytes()
