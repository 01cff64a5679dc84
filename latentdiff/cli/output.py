"""What a command writes where the user pointed: a new file, whole or not there."""

from __future__ import annotations

from pathlib import Path


def write_new(path: Path, content: bytes) -> None:
    """Write a file that was not there; none is left where the disk is full or the command is stopped meanwhile.

    Raises FileExistsError, also for what appeared since the caller looked, and OSError.
    """
    with path.open("xb") as file:
        try:
            file.write(content)
            file.flush()
        except BaseException:
            path.unlink()
            raise
