"""webdataset shards: members of a .tar file with one key are one sample, `000.jpg` with `000.txt` or `000.json`.

Only the headers are read here. Pictures are read from their place in a shard, in any order, and nothing is extracted.
We use the standard library's tarfile, since the webdataset library reads shards only from start to end; samples are
grouped in the same way.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections import defaultdict
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from latentdiff.core.decoding import SUFFIXES
from latentdiff.core.errors import ConfigError, DataError
from latentdiff.core.text import printable
from latentdiff.data.inside import check_link
from latentdiff.data.source import Listing, Options, Record, captions_in, lines_of

_Member = tuple[int, int, str]  # offset, length, name
_ELSEWHERE = -1  # links and sparse files: their bytes are not one piece of the archive
_MOST = 100_000  # shards


def is_sharded(source: str) -> bool:
    """Whether a source is .tar files: by name, as a range in braces, or a folder with some."""
    path = Path(source)
    return source.endswith(".tar") or (path.is_dir() and any(path.glob("*.tar")))


def listing(source: str, options: Options) -> Listing:
    """Every picture of every shard. Raises DataError, ConfigError."""
    records: list[Record] = []
    orphans: list[str] = []
    others = 0
    for shard in _shards(source, options.follow_links):
        samples, ignored = _samples(shard)
        others += ignored
        for key, members in samples.items():
            sample = _records(shard, key, members, options)
            records += sample
            if not sample:
                orphans += [f"{shard.name}/{printable(name)}" for _, _, name in members.values()]
    if not records:
        raise DataError(f"no pictures in {printable(source)}")
    notes = (f"{others} other members are not read",) if others else ()
    return Listing("shards", records, tuple(orphans), notes)


def _shards(source: str, follow_links: bool) -> list[Path]:
    from braceexpand import braceexpand

    if re.match(r"\w+:", source):
        raise ConfigError(f"shards must be files of this machine (got {printable(source)})")
    if Path(source).is_dir():
        shards = sorted(Path(source).glob("*.tar"))
        for shard in shards:
            check_link(shard, Path(source), follow_links)
        return shards
    try:
        names = islice(braceexpand(source), _MOST + 1) if "{" in source else [source]
        shards = [Path(name) for name in names]
    except ValueError:
        raise ConfigError(f"braces do not match ({printable(source)})") from None
    if len(shards) > _MOST:
        raise ConfigError(f"more than {_MOST:,} shards ({printable(source)})")
    for shard in shards:
        if not shard.is_file():
            raise DataError(f"no such shard ({printable(str(shard))})")
    return shards


def _samples(shard: Path) -> tuple[dict[str, dict[str, _Member]], int]:
    """Members by key and suffix (all after the first dot), and the number of members that are no picture or caption."""
    samples: dict[str, dict[str, _Member]] = defaultdict(dict)
    ignored = 0
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                if member.isdir():
                    continue
                stem, _, extension = path.name.partition(".")
                if not stem or _kind(extension.lower()) is None:
                    ignored += 1
                    continue
                group = samples[str(path.parent / stem)]
                if extension.lower() in group:
                    raise DataError(f"{shard.name} holds {printable(member.name)} twice")
                plain = member.isreg() and not member.issparse()
                group[extension.lower()] = (member.offset_data if plain else _ELSEWHERE, member.size, member.name)
            _check_end(shard, archive.offset)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"shard {printable(str(shard))} cannot be read: {error}") from None
    return samples, ignored


def _check_end(shard: Path, offset: int) -> None:
    """Check that an archive ends in zeros and nothing else. Raises tarfile.ReadError.

    tarfile stops silently at a truncated or damaged header, and at the end of the first of several archives.
    """
    with shard.open("rb") as file:
        file.seek(offset)
        rest = file.read(512)
        if rest != bytes(512):
            raise tarfile.ReadError(f"cut off or damaged at byte {offset:,}")
        while rest := file.read(2**20):
            if rest.count(0) != len(rest):
                raise tarfile.ReadError(f"more data follows its end at byte {offset:,}: archives must not be joined")


def _kind(extension: str) -> str | None:
    last = "." + extension.rsplit(".", 1)[-1]
    return "picture" if last in SUFFIXES else {".txt": "text", ".caption": "text", ".json": "json"}.get(last)


def _records(shard: Path, key: str, members: dict[str, _Member], options: Options) -> list[Record]:
    pictures = [member for extension, member in members.items() if _kind(extension) == "picture"]
    captions: tuple[str, ...] = ()
    for kind in ("json", "text"):  # a text file replaces the caption of a .json
        for extension, member in members.items():
            if _kind(extension) == kind:
                captions = _captions(shard, member, kind, options) or captions
    names = [f"{shard.name}/{name}" for _, _, name in pictures]
    fault = f"{len(pictures)} pictures of one key, {printable(key)}" if len(pictures) > 1 else ""
    return [
        Record(name, _reader(shard, member), captions, fault=fault)
        for name, member in zip(names, pictures, strict=True)
    ]


def _captions(shard: Path, member: _Member, kind: str, options: Options) -> tuple[str, ...]:
    where = f"{shard.name}/{printable(member[2])}"
    lines = lines_of(_read(shard, member), where)
    if kind == "text":
        return captions_in({"text": [line for line in lines if line.strip()]}, where)
    try:
        row = json.loads("\n".join(lines))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not valid JSON: {str(error)[:80]}") from None
    return captions_in(row, where, options.caption_column) if isinstance(row, dict) else ()


def _reader(shard: Path, member: _Member) -> Any:
    return lambda: _read(shard, member)


def _read(shard: Path, member: _Member) -> bytes:
    offset, size, _ = member
    if offset == _ELSEWHERE:
        raise DataError("a link or sparse file inside its archive")
    with shard.open("rb") as file:
        file.seek(offset)
        return file.read(size)
