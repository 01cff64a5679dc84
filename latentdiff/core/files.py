"""What is written where the user pointed: a new file, whole or not there."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from latentdiff.core.errors import ConfigError


def check_writable(output: Path, folder: Path) -> None:
    """Refuse `output` before any work where nothing can be written to `folder`, or to the nearest that there is.

    Nothing is created. Raises ConfigError, also for a name that no file can have.
    """
    try:
        str(output).encode()  # libraries write names into files of text
        _exists(output)
        there = next(path for path in (folder, *folder.absolute().parents) if _exists(path))
        tempfile.TemporaryFile(dir=there).close()  # the one sure way to know
    except UnicodeEncodeError:
        raise ConfigError(f"cannot write to {str(output)!r} (the name is not valid UTF-8)") from None
    except OSError as error:
        raise ConfigError(f"cannot write to {output} ({(error.strerror or str(error)).lower()})") from None


def check_page(output: Path, ours: str) -> None:
    """Refuse before any work where a file cannot be written, or would replace one that does not begin as ours do."""
    check_writable(output, output.parent)
    if output.is_dir() or not output.parent.is_dir():
        raise ConfigError(f"cannot write to {output} (no such folder, or a folder itself)")
    if output.is_file() and not output.read_bytes().startswith(ours.encode()):
        raise ConfigError(f"{output} is a file of yours; nothing is overwritten. Choose another name")


def _exists(path: Path) -> bool:
    """Whether there is anything of that name; unlike Path.exists, a name that cannot be is an OSError."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def printable(text: str | Path) -> str:
    """The text as a terminal can show it: what is no character is escaped."""
    return str(text).encode("utf-8", "backslashreplace").decode()


@contextmanager
def whole(output: Path) -> Iterator[Path]:
    """A place to write a file or a folder to, which becomes `output` once all of it is there; of what fails is nothing.

    Of a folder that is there already the files are replaced one by one, and others stay. Weights get the umask's mode.
    """
    from latentdiff.formats.folder import let_others_read

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".latentdiff-", dir=output.parent) as scratch:
        made = Path(scratch) / output.name
        yield made
        let_others_read(Path(scratch))
        if not output.is_dir():
            made.rename(output)
            return
        for file in [path for path in made.rglob("*") if path.is_file()]:
            target = output / file.relative_to(made)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)


def write_json(path: Path, tree: dict[str, Any]) -> None:
    """A file of JSON, in folders made for it, in the place of one that is there; whole or not at all."""
    with whole(path) as made:
        made.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def write_new(path: Path, content: bytes) -> None:
    """Write a file that was not there; none is left where the disk is full or the command is stopped meanwhile.

    On Linux not even by SIGKILL: it has no name before it is whole. Raises FileExistsError, also for what appeared
    since the caller looked, and OSError; they name the file.
    """
    try:
        _write_new(path, content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None  # which gives one of the same kind


def _write_new(path: Path, content: bytes) -> None:
    try:
        unnamed = os.open(path.parent, os.O_TMPFILE | os.O_WRONLY, 0o666)
    except (AttributeError, OSError):  # another system, or a disk that cannot
        _write_named(path, content)
        return
    with open(unnamed, "wb") as file:  # noqa: PTH123 - a descriptor, no path
        file.write(content)
        file.flush()
        # a folder for the source, which its absolute name has no use for, makes Python follow the link
        os.link(f"/proc/self/fd/{unnamed}", path, src_dir_fd=unnamed, follow_symlinks=True)


def _write_named(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        try:
            file.write(content)
            file.flush()
        except BaseException:
            path.unlink()
            raise
