"""What a data set may read: files in its own folder.

A path in somebody's metadata, or a symbolic link among somebody's pictures, could lead to any file of this machine, and
its text would become a caption.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Any

from latentdiff.core.errors import DataError


def named_inside(parent: PurePosixPath, name: Any, where: str) -> str:
    """A path that a file of the data set names, relative to the data set's folder. Raises DataError if it leaves it."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise DataError(f"{where} has no file_name")
    path = os.path.normpath((parent / name).as_posix())
    if path.startswith(("../", "/")) or path == "..":
        raise DataError(f"{where} names a file outside its folder ({name})")
    return path


def check_link(path: Path, root: Path, follow_links: bool) -> None:
    """Refuse a symbolic link out of the data set's folder. Raises DataError."""
    if follow_links or not path.is_symlink():
        return
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
        name = os.path.relpath(path, root)
        raise DataError(f"{name} is a link out of the data set. Set data.pictures.follow_links=true to follow it")
