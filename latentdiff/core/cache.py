"""What was slow to make, kept in the user's cache directory for the next start.

A file is called by a hash of all that it was made from. It begins with the CRC-32 of what follows: what is damaged is
made anew. The least used are removed over LIMIT.
"""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from latentdiff.core.files import whole

LIMIT = 20 * 2**30  # bytes of all that is kept
KINDS = ("*.blob", "*.features")  # of our files


@dataclass(frozen=True)
class Kept:
    """What lies in a file, uint8 (N,), and the CRC-32 that it should have."""

    file: Path
    checksum: bytes
    content: np.ndarray

    def is_whole(self) -> bool:
        """Whether it is what was written; a tenth of a second for 200 MB."""
        return _checksum(self.content.data) == self.checksum


def file(name: str) -> Path | None:
    """Where something of that name is kept, by the system's custom; nowhere for who has no home."""
    own = os.environ.get("LATENTDIFF_CACHE")
    try:
        return (Path(own) if own else _usual_folder()) / name
    except RuntimeError:  # of expanduser
        return None


def _usual_folder() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", "~")).expanduser() / "latentdiff" / "cache"
    if sys.platform == "darwin":
        return Path("~/Library/Caches/latentdiff").expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "latentdiff"


def kept(path: Path) -> Kept | None:
    """What was kept, mapped and not yet read."""
    try:
        content = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError):
        return None
    with suppress(OSError):  # of a cache that can only be read
        os.utime(path)
    return Kept(path, content[:4].tobytes(), content[4:])


def keep(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all; where nothing can be written the next start makes it again."""
    try:
        with whole(path) as made, made.open("wb") as file:
            file.write(_checksum(content))
            file.write(content)
        ours = [found for kind in KINDS for found in path.parent.glob(kind)]
        _prune(sorted(ours, key=lambda found: found.stat().st_mtime, reverse=True))
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
