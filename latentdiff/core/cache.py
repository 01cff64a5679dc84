"""The user's cache directory: results that are slow to compute, for the next start.

A file is named by a hash of everything it was computed from. It begins with the CRC-32 of the rest, so that a damaged
file is computed again. Above LIMIT the least recently used files are removed.
"""

from __future__ import annotations

import mmap
import os
import sys
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latentdiff.core.files import atomic

LIMIT = 20 * 2**30  # bytes of all files together
KINDS = ("*.blob", "*.features")  # names of our files


@dataclass(frozen=True)
class Kept:
    """The content of a cached file, uint8 (N,), and the CRC-32 that it should have."""

    file: Path
    checksum: bytes
    content: np.ndarray

    def release(self) -> None:
        """Let the system drop the pages that were read; if they are needed again, they are read again."""
        mapping: Any = self.content
        while mapping is not None and not isinstance(mapping, mmap.mmap):
            mapping = getattr(mapping, "base", None)
        if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            mapping.madvise(mmap.MADV_DONTNEED)

    def is_whole(self) -> bool:
        """Whether the content has its CRC-32; this takes a tenth of a second for 200 MB."""
        return _checksum(self.content.data) == self.checksum


def file(name: str) -> Path | None:
    """The path of a cached file in the system's usual place. None if there is no home directory."""
    own = os.environ.get("LATENTDIFF_CACHE")
    try:
        return (Path(own).expanduser() if own else _usual_folder()) / name
    except RuntimeError:  # expanduser found no home
        return None


def _usual_folder() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", "~")).expanduser() / "latentdiff" / "cache"
    if sys.platform == "darwin":
        return Path("~/Library/Caches/latentdiff").expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "latentdiff"


def kept(path: Path) -> Kept | None:
    """A cached file, memory-mapped and not yet read. None if there is none."""
    try:
        content = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError):
        return None
    with suppress(OSError):  # the cache may be read-only
        os.utime(path)
    return Kept(path, content[:4].tobytes(), content[4:])


def keep(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all. If it cannot be written, nothing happens: the next start computes it again."""
    try:
        with atomic(path) as made, made.open("wb") as file:
            file.write(_checksum(content))
            file.write(content)
        ours = [file for kind in KINDS for file in path.parent.glob(kind)]
        _prune(sorted(ours, key=lambda file: file.stat().st_mtime, reverse=True))
    except OSError:
        return


def _prune(newest_first: Sequence[Path]) -> None:
    total = 0
    for path in newest_first:
        total += path.stat().st_size
        if total > LIMIT:
            path.unlink()


def _checksum(content: bytes | memoryview) -> bytes:
    return zlib.crc32(content).to_bytes(4, "little")
