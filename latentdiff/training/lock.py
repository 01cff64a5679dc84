"""A lock that allows one training process per run folder; it ends with the process, however that ends."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from latentdiff.core.errors import ConfigError

NAME = ".lock"


@contextmanager
def locked(folder: Path, doing: str = "training") -> Iterator[None]:
    """A block that holds the lock of a folder, which is created if necessary. Raises ConfigError if it is locked.

    A loader's workers, which may live a little longer than the process, do not hold the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / NAME).open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"another process is {doing} in {folder}. Wait for it, or name another folder") from None
        yield


def is_locked(folder: Path) -> bool:
    """Whether a process holds the folder's lock."""
    if not (folder / NAME).is_file():
        return False
    with (folder / NAME).open("r") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
