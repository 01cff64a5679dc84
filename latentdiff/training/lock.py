"""One training process to a run folder: a lock that ends with the process, however that ends."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from latentdiff.core.errors import ConfigError

NAME = ".lock"


@contextmanager
def locked(folder: Path, doing: str = "training") -> Iterator[None]:
    """Keep other starts out of the folder, which is made where there is none. Raises ConfigError.

    The lock is this process's alone: a loader's workers, which may live a little longer than it, do not hold it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / NAME).open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"another process is {doing} in {folder}. Wait for it, or name another folder") from None
        yield


def is_locked(folder: Path) -> bool:
    """Whether a process is training there now."""
    if not (folder / NAME).is_file():
        return False
    with (folder / NAME).open("r") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
