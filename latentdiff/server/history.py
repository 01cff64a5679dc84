"""All pictures of a folder, searched by words, model and date.

The pictures are the truth: what is known of them is their own records. An index beside them, `.history.sqlite`, only
makes searching fast. It follows the folder before each search, and is written anew if it is missing or damaged.
"""

from __future__ import annotations

import re
import sqlite3
import threading
import zlib
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cache
from os import DirEntry, scandir
from pathlib import Path
from typing import Any

from latentdiff.core.errors import DataError
from latentdiff.drawing.record import read_metadata
from latentdiff.drawing.reproduce import Record, record_in

FILE = ".history.sqlite"
LATEST = 2**62  # microseconds, after all pictures
PICTURE = re.compile(r"\d{5,9}-\d{1,20}\.(png|jpe?g|webp)")
LARGEST = 256 * 2**20  # bytes of a picture whose record is read
_TABLES = """
CREATE TABLE pictures
    (id INTEGER PRIMARY KEY, name TEXT UNIQUE, changed INTEGER, size INTEGER, model TEXT, record TEXT);
CREATE INDEX by_time ON pictures (changed, id);
CREATE VIRTUAL TABLE words USING fts5 (text);
"""


@dataclass(frozen=True)
class Search:
    """words: all must be in the prompt or the negative prompt, as beginnings of words. since, until: microseconds.

    before: the `place` of an entry; only older ones are found.
    """

    words: str = ""
    model: str = ""
    since: int = -LATEST
    until: int = LATEST
    before: tuple[int, int] = (LATEST, 0)
    count: int = 60


@dataclass(frozen=True)
class Entry:
    """A picture: its name, its place in the history (the time of its file in microseconds, a number), its record."""

    name: str
    place: tuple[int, int]
    record: Record


class History:
    """See the module. Several threads and processes may use it."""

    def __init__(self, folder: Path):
        self._folder, self._path, self._turn = folder, folder / FILE, threading.Lock()
        self._is_checked, self._models = False, list[str]()

    def search(self, search: Search) -> list[Entry]:
        """The pictures that fit, the newest first."""
        if not self._folder.is_dir():
            return []
        with self._turn:
            try:
                return self._searched(search)
            except sqlite3.DatabaseError:  # damaged, or removed meanwhile
                self._remove_index()
            try:
                return self._searched(search)
            except sqlite3.DatabaseError:  # it cannot be written here
                return self._searched(search, ":memory:")

    def models(self) -> list[str]:
        """The models that have drawn here, as of the last search."""
        return self._models

    def _searched(self, search: Search, place: str | None = None) -> list[Entry]:
        with closing(_opened(place or str(self._path), check=not self._is_checked)) as index, index:
            self._is_checked = True
            self._follow(index)
            names = index.execute("SELECT DISTINCT model FROM pictures WHERE record IS NOT NULL ORDER BY model")
            self._models = [name for (name,) in names]
            return [_entry(row) for row in index.execute(*_query(search))]

    def _remove_index(self) -> None:
        for path in (self._path, self._path.with_name(f"{FILE}-journal")):
            with suppress(OSError):
                path.unlink()

    def _follow(self, index: sqlite3.Connection) -> None:
        """Enter new and changed pictures, and remove those that are gone."""
        rows = index.execute("SELECT name, changed, size FROM pictures")
        known = {name: (changed, size) for name, changed, size in rows}
        with scandir(self._folder) as entries:
            there = {entry.name: _state(entry) for entry in entries if _is_picture(entry)}
        for name in known.keys() - there.keys():
            _remove(index, name)
        for name in sorted(name for name, state in there.items() if known.get(name) != state):
            _enter(index, self._folder / name, *there[name])


@cache
def _version() -> int:
    """The version of the index: it changes with the tables, and with the form of a record."""
    return zlib.crc32(f"{_TABLES}{Record.model_json_schema()}".encode()) >> 1


def _opened(path: str, *, check: bool = False) -> sqlite3.Connection:
    """The index at a path, made if there is none. check: whether every page is read, which finds damage.

    Raises sqlite3.DatabaseError.
    """
    index = sqlite3.connect(path, timeout=30)
    try:
        (version,) = index.execute("PRAGMA user_version").fetchone()
        if version != _version():
            if version or index.execute("SELECT count(*) FROM sqlite_master").fetchone() != (0,):
                raise sqlite3.DatabaseError("another version")
            index.executescript(f"BEGIN; {_TABLES} PRAGMA user_version = {_version()}; COMMIT;")
        if check and index.execute("PRAGMA quick_check").fetchone() != ("ok",):
            raise sqlite3.DatabaseError("damaged")
    except BaseException:
        index.close()
        raise
    return index


def _is_picture(entry: DirEntry[str]) -> bool:
    return PICTURE.fullmatch(entry.name) is not None and entry.is_file(follow_symlinks=False)


def _state(entry: DirEntry[str]) -> tuple[int, int]:
    stat = entry.stat(follow_symlinks=False)
    return stat.st_mtime_ns // 1000, stat.st_size


def _enter(index: sqlite3.Connection, path: Path, changed: int, size: int) -> None:
    """Enter a picture; one without a valid record is entered too, but no search returns it."""
    _remove(index, path.name)
    record = _record(path, size)
    row = (path.name, changed, size, record and record.model, record and record.model_dump_json())
    into = "INSERT INTO pictures (name, changed, size, model, record) VALUES (?, ?, ?, ?, ?)"
    place = index.execute(into, row).lastrowid
    if record is not None:
        text = f"{record.request.prompt}\n{record.request.negative_prompt}"
        index.execute("INSERT INTO words (rowid, text) VALUES (?, ?)", (place, text))


def _record(path: Path, size: int) -> Record | None:
    try:
        return record_in(read_metadata(path, decoded=False), path.name) if size <= LARGEST else None
    except DataError:
        return None


def _remove(index: sqlite3.Connection, name: str) -> None:
    index.execute("DELETE FROM words WHERE rowid IN (SELECT id FROM pictures WHERE name = ?)", (name,))
    index.execute("DELETE FROM pictures WHERE name = ?", (name,))


def _query(search: Search) -> tuple[str, tuple[Any, ...]]:
    """The SQL of a search, and its values."""
    where, values = ["record IS NOT NULL", "(changed, id) < (?, ?)", "changed BETWEEN ? AND ?"], list[Any]()
    values += [*search.before, search.since, search.until]
    if search.model:
        where.append("model = ?")
        values.append(search.model)
    if words := re.findall(r"\w+", search.words):
        where.append("id IN (SELECT rowid FROM words WHERE words MATCH ?)")
        values.append(" ".join(f'"{word}"*' for word in words))
    elif search.words.strip():  # punctuation only, which the index does not contain
        where.append("id IN (SELECT rowid FROM words WHERE instr(text, ?))")
        values.append(search.words.strip())
    text = "SELECT name, changed, id, record FROM pictures WHERE " + " AND ".join(where)
    return f"{text} ORDER BY changed DESC, id DESC LIMIT ?", (*values, search.count)


def _entry(row: tuple[str, int, int, str]) -> Entry:
    name, changed, place, record = row
    return Entry(name, (changed, place), Record.model_validate_json(record))
