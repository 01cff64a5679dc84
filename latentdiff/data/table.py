"""Tables of pictures, read by Hugging Face's `datasets`: saved sets, parquet files, hub ids; whole or streamed.

Pictures keep their encoded bytes, so a picture has the same identity in a table and in a file of its own. A hub id is
fetched because the user named it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from latentdiff.core.errors import ConfigError, DataError, LatentDiffError, raised_as
from latentdiff.data.source import CAPTION_KEYS, Listing, Options, Record, captions_in, check_column


def is_table(path: Path) -> bool:
    """Whether a path is a saved data set, a parquet file, or a folder of them."""
    if path.is_dir():
        return _is_saved(path) or any(path.rglob("*.parquet"))
    return path.suffix == ".parquet" and path.is_file()


def _is_saved(path: Path) -> bool:
    """Whether `datasets` wrote the folder."""
    return (path / "dataset_dict.json").is_file() or (
        (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    )


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
    table = _undecoded(table.select_columns([image, *([caption] if caption else [])]), image)
    if options.streaming:
        return Listing("table", _Stream(source, table, image, caption), streamed=True)
    captions = table[caption] if caption else [None] * len(table)
    records = []
    for number, text in enumerate(captions):
        captions = captions_in({"text": text}, f"{source} row {number}")
        records.append(Record(f"row {number}", _reader(table, number, image), captions))
    if not records:
        raise DataError(f"no rows in {source}")
    return Listing("table", records, notes=_other_splits(table))


def _other_splits(table: Any) -> tuple[str, ...]:
    others = sorted(str(name) for name in table.info.splits or () if str(name) != str(table.split))
    return (f"other splits are not read: {', '.join(others)}",) if others else ()


class _Stream:
    """Records in the order of the rows, each with its bytes; it can be read several times."""

    def __init__(self, source: str, table: Iterable[dict[str, Any]], image: str, caption: str | None):
        self._source, self._table, self._image, self._caption = source, table, image, caption

    def __iter__(self) -> Iterator[Record]:
        for number, row in enumerate(self._rows()):
            captions = captions_in({"text": row[self._caption] if self._caption else None}, f"row {number}")
            yield Record(f"row {number}", _bytes_in_hand(row[self._image]), captions)

    def _rows(self) -> Iterator[dict[str, Any]]:
        rows = iter(self._table)
        while True:
            with raised_as(DataError, f"cannot read the data set {self._source}"):
                row = next(rows, None)
            if row is None:
                return
            yield row


def _bytes_in_hand(cell: Any) -> Callable[[], bytes]:
    return lambda: _bytes(cell)


def _opened(source: str, options: Options) -> Any:
    from datasets import DatasetDict, disable_progress_bars, load_dataset, load_from_disk

    disable_progress_bars()
    path = Path(source)
    try:
        if _is_saved(path):
            table = load_from_disk(source)
            if isinstance(table, DatasetDict):
                table = _split(table, options, source)
            return table.to_iterable_dataset() if options.streaming else table
        if path.is_file():
            return load_dataset("parquet", data_files=[source], split="train", streaming=options.streaming)
        return load_dataset(source, split=options.split, streaming=options.streaming)
    except LatentDiffError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"cannot read the data set {source}: {reason}") from None


def _split(table: Any, options: Options, source: str) -> Any:
    if options.split not in table:
        raise ConfigError(f'{source} has no split "{options.split}". Its splits: {", ".join(table)}')
    return table[options.split]


def _undecoded(table: Any, column: str) -> Any:
    """The table with pictures as bytes: the decoder of `datasets` does not refuse what ours refuses."""
    from datasets import Image

    feature = (table.features or {}).get(column)
    return table.cast_column(column, Image(decode=False)) if isinstance(feature, Image) else table


def _reader(table: Any, number: int, column: str) -> Callable[[], bytes]:
    return lambda: _bytes(table[number][column])


def _bytes(cell: Any) -> bytes:
    """The bytes of a cell, or of the local file that it names."""
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes):
        return cell
    if isinstance(cell, str) and Path(cell).is_file():
        return Path(cell).read_bytes()
    raise DataError("no picture" if not cell else f"not bytes of a picture but {str(cell)[:60]}")
