"""A folder of pictures: captions in metadata files, in sidecars beside them, or nowhere.

- metadata: metadata.jsonl or .csv in the folder or below, `file_name` relative to it, the caption in `text`
- sidecars: kohya's, img.png with img.txt (or .caption), each line one caption; a folder `10_name` counts 10 times
- classes: the folder that a picture lies in is its caption, "cat", or "animals/cat"
- drawn: the prompts in the records of PNG that this package has drawn
- uncaptioned: neither; in a folder `10_a dog` the caption is "a dog", unless there is an instance prompt

Folders `train` and `test` (or `val`, ...) beside each other are splits, of which one is read, as by `datasets`.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from latentdiff.core.decoding import SUFFIXES
from latentdiff.core.errors import ConfigError, DataError
from latentdiff.core.text import printable
from latentdiff.data.inside import check_link, named_inside
from latentdiff.data.records import prompts_in
from latentdiff.data.source import CAPTION_KEYS, Listing, Options, Record, captions_in, check_column, lines_of

METADATA = ("metadata.jsonl", "metadata.csv")
SIDECARS = (".txt", ".caption")
_SPLITS = {"train", "test", "val", "valid", "validation", "dev", "eval"}
_NOT_CAPTIONS = ("readme", "license", "licence", "copying", "notice", "classes", "requirements")


def listing(root: Path, options: Options) -> Listing:
    """Every picture of a folder and its sub-folders. Raises DataError."""
    files = sorted(_files(root, options.follow_links))
    others = _other_splits(root, files, options)
    files = [file for file in files if file.split("/")[0] not in others]
    metadata = [file for file in files if PurePosixPath(file).name in METADATA]
    pictures = [file for file in files if _is_picture(file)]
    stems = {_stem(file) for file in pictures}
    beside = [file for file in files if _is_sidecar(file)]
    has_sidecars = any(_stem(file) in stems for file in beside)
    layout = options.layout
    if layout == "auto":
        layout = "metadata" if metadata else "sidecars" if has_sidecars else "uncaptioned"
    if layout == "metadata":
        own, read = _by_metadata(root, files, pictures, metadata, others, options), {*metadata}
    elif layout == "sidecars":
        own, read = _by_sidecars(root, pictures, beside), {*beside}
    elif layout == "drawn":
        records = [Record(name, _reader(root, name), prompts_in(root / name)) for name in pictures]
        own, read = Listing("drawn", records), set()
    elif layout == "classes":
        records = [Record(name, _reader(root, name), (_class_of(name, root),)) for name in pictures]
        own, read = Listing("classes", records), set()
    else:
        names = [(name, *_of_folder_name(name)) for name in pictures]
        records = [Record(name, _reader(root, name), repeats=repeats, words=words) for name, words, repeats in names]
        own, read = Listing("uncaptioned", records), set()
    if not own.records:
        raise DataError(f"no pictures in {root}. Known suffixes: {', '.join(sorted(SUFFIXES))}")
    unread = sorted(set(files) - read - {record.name for record in own.records})
    splits = (f"other splits are not read: {', '.join(sorted(others))}",) if others else ()
    return Listing(own.layout, own.records, own.orphans, (*own.notes, *_note(unread), *splits))


def _other_splits(root: Path, files: list[str], options: Options) -> set[str]:
    """The top folders that hold splits not to be read; none unless the folder has two. Raises ConfigError."""
    tops = {file.split("/")[0] for file in files if "/" in file.rstrip("/")}
    splits = {top: top.lower() for top in tops if top.lower() in _SPLITS}
    if len(splits) < 2:
        return set()
    if options.split not in splits.values():
        raise ConfigError(f'{root} has no split "{options.split}". Its splits: {", ".join(sorted(splits))}')
    return {top for top, split in splits.items() if split != options.split}


def has_pictures(root: Path) -> bool:
    """Whether the folder or a sub-folder has a picture."""
    return any(_is_picture(file) for file in _files(root, follow_links=True))


def _is_picture(file: str) -> bool:
    """Whether a file has a picture's suffix and is not hidden: file managers leave hidden files beside pictures."""
    return _suffix(file) in SUFFIXES and not PurePosixPath(file).name.startswith(".")


def _files(root: Path, follow_links: bool) -> Iterator[str]:
    """Paths relative to the root, also through links inside it, each folder once; a hidden folder counts as one name.

    Raises DataError for a link out of the root, unless all links are to be followed.
    """
    seen = set()
    for parent, folders, names in os.walk(root, onerror=_raise, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (f"{Path(parent, name).relative_to(root).as_posix()}/" for name in folders if name.startswith("."))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in (*folders, *names):
            check_link(Path(parent, name), root, follow_links)
        yield from (Path(parent, name).relative_to(root).as_posix() for name in names)


def _raise(error: OSError) -> None:
    """Raise DataError for a folder that cannot be listed; os.walk would treat it as empty."""
    raise DataError(f"{printable(str(error.filename))} cannot be read ({(error.strerror or str(error)).lower()})")


def _by_metadata(
    root: Path, files: list[str], pictures: list[str], metadata: list[str], others: set[str], options: Options
) -> Listing:
    """One picture a row; a file that a row names is a picture, whatever its suffix."""
    if not metadata:
        raise DataError(f"no metadata.jsonl or metadata.csv in {root}")
    captions_by_name: dict[str, list[tuple[str, tuple[str, ...]]]] = defaultdict(list)
    orphans, known = [], _Names(files)
    for file in metadata:
        parent = PurePosixPath(file).parent
        for where, row in _rows(root / file, file, options):
            path = named_inside(parent, row.get("file_name"), where)
            if path.split("/")[0] in others:
                continue
            name = known.find(path)
            captions = captions_in(row, where, options.caption_column)
            if name is None:
                orphans.append(f"{printable(str(row['file_name']))} ({where})")
            else:
                captions_by_name[name].append((where, captions))
    records = []
    for name in sorted({*pictures, *captions_by_name}):
        rows = captions_by_name.get(name, [])
        fault = f"{len(rows)} rows: {' and '.join(where for where, _ in rows)}" if len(rows) > 1 else ""
        records.append(Record(name, _reader(root, name), rows[0][1] if rows else (), fault=fault))
    return Listing("metadata", records, tuple(orphans))


class _Names:
    """Files by the names in rows: equal bytes, or else equal in Unicode's canonical form if only one file is."""

    def __init__(self, files: list[str]):
        self._files = set(files)
        self._forms: dict[str, list[str]] = defaultdict(list)
        for file in files:
            self._forms[unicodedata.normalize("NFC", file)].append(file)

    def find(self, name: str) -> str | None:
        if name in self._files:
            return name
        same = self._forms[unicodedata.normalize("NFC", name)]
        return same[0] if len(same) == 1 else None


def _rows(path: Path, name: str, options: Options) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where, row) for each line of a metadata file. Raises DataError that names the line."""
    lines = lines_of(_read_text(path, name), name)
    rows = list(_csv_rows(lines, name) if name.endswith(".csv") else _json_rows(lines, name))
    columns = list(dict.fromkeys(key for _, row in rows for key in row))
    if rows:
        check_column(columns, options.caption_column, CAPTION_KEYS, "caption_column", name)
    yield from rows


def _json_rows(lines: list[str], name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(lines, 1):
        where = f"{name} line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_without_doubles)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is not valid JSON: {str(error)[:80]}") from None
        if not isinstance(row, dict):
            raise DataError(f"{where} is not a JSON object")
        yield where, row


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def _csv_rows(lines: list[str], name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    reader = csv.DictReader(io.StringIO("\n".join(lines), newline=""), strict=True)
    try:
        if len(set(reader.fieldnames or ())) < len(reader.fieldnames or ()):
            raise DataError(f"{name} has a column twice: {', '.join(reader.fieldnames or ())}")
        for row in reader:
            where = f"{name} line {reader.line_num}"
            if None in row:
                raise DataError(f"{where} has more fields than there are columns")
            yield where, row
    except csv.Error as error:
        raise DataError(f"{name} line {reader.line_num} is not valid CSV: {error}") from None


def _by_sidecars(root: Path, pictures: list[str], beside: list[str]) -> Listing:
    """Pictures and their sidecars by stem. Two pictures with one stem share a sidecar, which is ambiguous."""
    of_stem: dict[str, list[str]] = defaultdict(list)
    for name in pictures:
        of_stem[_stem(name)].append(name)
    sidecars: dict[str, str] = {}
    for suffix in reversed(SIDECARS):  # the first kind wins
        sidecars |= {_stem(file): file for file in beside if _suffix(file) == suffix}
    records = []
    for name in pictures:
        stem = _stem(name)
        sidecar, others = sidecars.get(stem), [other for other in of_stem[stem] if other != name]
        captions = _lines_as_captions(_read_text(root / sidecar, sidecar), sidecar) if sidecar else ()
        fault = f"shares {printable(sidecar)} with {printable(', '.join(others))}" if sidecar and others else ""
        records.append(Record(name, _reader(root, name), captions, _of_folder_name(name)[1], fault=fault))
    orphans = [printable(file) for stem, file in sidecars.items() if stem not in of_stem]
    unread = sorted(set(beside) - set(sidecars.values()))
    notes = [f"{len(unread)} captions are not read, because another is beside each"] if unread else []
    return Listing("sidecars", records, tuple(orphans), tuple(notes))


def _lines_as_captions(data: bytes, name: str) -> tuple[str, ...]:
    return captions_in({"text": [line for line in lines_of(data, printable(name)) if line.strip()]}, printable(name))


def _of_folder_name(name: str) -> tuple[str, int]:
    """The words and the repeats in a folder name like `10_a dog`."""
    match = re.fullmatch(r"(\d{1,6})_(.+)", PurePosixPath(name).parent.name)
    return (match[2], max(int(match[1]), 1)) if match else ("", 1)


def _class_of(name: str, root: Path) -> str:
    """The folder of a picture, without that of its split. Raises DataError for a picture outside of any."""
    parts = PurePosixPath(name).parent.parts
    parts = parts[1:] if len(parts) > 1 and parts[0].lower() in _SPLITS else parts
    if not parts:
        raise DataError(f"{printable(name)} lies in no folder of a class ({root})")
    return unicodedata.normalize("NFC", "/".join(parts))


def _is_sidecar(file: str) -> bool:
    path = PurePosixPath(file)
    return path.suffix.lower() in SIDECARS and path.stem.lower() not in _NOT_CAPTIONS


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _reader(root: Path, name: str) -> Any:
    return lambda: _read(root / name)


def _read(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait
            raise DataError("not a file")
        return path.read_bytes()
    except OSError as error:
        raise DataError((error.strerror or str(error)).lower()) from None


def _read_text(path: Path, name: str) -> bytes:
    try:
        return _read(path)
    except DataError as error:
        raise DataError(f"{printable(name)} cannot be read ({error})") from None


def _note(others: list[str]) -> list[str]:
    if not others:
        return []
    more = ", ..." if len(others) > 5 else ""
    return [f"{len(others)} other files are not read: {', '.join(map(printable, others[:5]))}{more}"]
