"""Files on disk: written whole or not at all, readable by others, identified by their sha256.

The package writes every file through here that replaces another, or that somebody may read while it is written.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from latentdiff.core.errors import ConfigError

SCRATCH = ".latentdiff-"  # how the name of a folder for unfinished files begins
_MARK = ".scratch-of-latentdiff"
_YOUNG = 10.0  # seconds in which a scratch folder may not be locked yet
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux's renameat2


def check_writable(output: Path, folder: Path) -> None:
    """Check before any work that `folder`, or its nearest parent that exists, takes files. Creates nothing.

    Raises ConfigError, also for a name that no file can have.
    """
    try:
        str(output).encode()  # libraries write names into text files
        _exists(output)
        there = next(path for path in (folder, *folder.absolute().parents) if _exists(path))
        tempfile.TemporaryFile(dir=there).close()  # the only reliable test
    except UnicodeEncodeError:
        raise ConfigError(f"cannot write to {str(output)!r} (the name is not valid UTF-8)") from None
    except OSError as error:
        raise ConfigError(f"cannot write to {output} ({(error.strerror or str(error)).lower()})") from None


def check_page(output: Path, ours: str) -> None:
    """Check before any work that a file can be written and replaces only a file that begins with `ours`."""
    check_writable(output, output.parent)
    if output.is_dir() or not output.parent.is_dir():
        raise ConfigError(f"cannot write to {output} (its folder is missing, or it is a folder itself)")
    if output.is_file() and not output.read_bytes().startswith(ours.encode()):
        raise ConfigError(f"{output} is a file of yours; nothing is overwritten. Choose another name")


def _exists(path: Path) -> bool:
    """Whether anything has that name. Unlike Path.exists, an impossible name raises OSError."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def recorded(path: Path) -> str:
    """A path as pictures record it: a relative path as typed, of an absolute path only the name."""
    return path.name if path.is_absolute() else path.as_posix()


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A temporary folder inside `folder`, on the same disk, so that files can be renamed out of it.

    Scratch folders that killed processes left there are removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder)
    temporary = tempfile.TemporaryDirectory(prefix=SCRATCH, dir=folder, ignore_cleanup_errors=True)
    with temporary as made, _held(Path(made)):  # until this process ends, however it ends
        (Path(made) / _MARK).touch()
        yield Path(made)


def _remove_abandoned(folder: Path) -> None:
    """Remove the scratch folders in `folder` whose processes have been killed."""
    for left in folder.glob(f"{SCRATCH}*"):
        if (left / _MARK).is_file():  # else a folder of somebody else
            _remove_if_abandoned(left)


def _remove_if_abandoned(folder: Path) -> None:
    """Remove a scratch folder whose process has ended: nothing holds its lock any more."""
    with suppress(FileNotFoundError), _held(folder) as ours:  # another process may remove it at the same time
        if ours and time.time() - folder.stat().st_mtime > _YOUNG:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Lock a folder for this process; False if another holds it, or if the system has no such locks."""
    if sys.platform == "win32" or folder.is_symlink() or not folder.is_dir():
        yield False
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = True
    except OSError:
        held = False
    try:
        yield held
    finally:
        os.close(handle)


@contextmanager
def atomic(output: Path, replaces: frozenset[str] = frozenset()) -> Iterator[Path]:
    """A path to write a file or a folder to; it is renamed to `output` once the block ends without an error.

    On failure nothing is left behind. An existing folder is exchanged for the new one in one step, so that a reader
    finds the old one or the new one. Top-level entries that only the old one has are kept, except for those named in
    `replaces`.
    """
    if output.is_symlink() and output.is_dir():
        output = output.resolve()
    with scratch(output.parent) as unfinished:
        made = unfinished / output.name
        yield made
        let_others_read(unfinished)
        if output.is_dir() and made.is_dir():
            _take_over(output, made, replaces)
            _exchange(made, output)
        else:
            made.replace(output)


def _take_over(old: Path, new: Path, replaces: frozenset[str]) -> None:
    """Add the top-level entries that only the old folder has to the new one, as hard links where possible."""
    new.chmod(old.stat().st_mode & 0o7777)
    for entry in old.iterdir():
        target = new / entry.name
        if os.path.lexists(target) or entry.name in replaces:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, target, symlinks=True, copy_function=_link)
        else:
            _link(entry, target)


def _link(source: str | Path, target: str | Path) -> None:
    """A hard link, or a copy where the file system has none."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _exchange(new: Path, old: Path) -> None:
    """Exchange two folders: Linux in one step, other systems in two, between which `old` is absent."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    names = os.fsencode(new.absolute()), os.fsencode(old.absolute())
    if rename is not None and rename(_HERE, names[0], _HERE, names[1], _EXCHANGE) == 0:
        return
    aside = new.with_name(f"{new.name}.old")
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file, replacing one that exists, whole or not at all; its folders are created."""
    with atomic(path) as made:
        made.write_text(text, encoding="utf-8")


def write_json(path: Path, tree: Any, indent: int = 2) -> None:
    """Write a JSON file; see `write_text`."""
    write_text(path, json.dumps(tree, indent=indent) + "\n")


def write_new(path: Path, content: bytes) -> None:
    """Write a file that must not exist; on a full disk or an interruption nothing is left behind.

    On Linux not even SIGKILL leaves a part: the file has no name before it is whole. Raises FileExistsError and
    OSError, which name the file.
    """
    try:
        _write_new(path, content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None  # OSError picks the subclass by the number


def _write_new(path: Path, content: bytes) -> None:
    try:
        unnamed = os.open(path.parent, os.O_TMPFILE | os.O_WRONLY, 0o666)
    except (AttributeError, OSError):  # another system, or a file system without unnamed files
        _write_named(path, content)
        return
    with open(unnamed, "wb") as file:  # noqa: PTH123 - a descriptor, no path
        file.write(content)
        file.flush()
        # an absolute source ignores src_dir_fd, but with it Python calls linkat, which follows the link
        os.link(f"/proc/self/fd/{unnamed}", path, src_dir_fd=unnamed, follow_symlinks=True)


def _write_named(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        try:
            file.write(content)
            file.flush()
        except BaseException:
            path.unlink()
            raise


def flush(path: Path) -> None:
    """Force a file or a folder to the disk: a rename must not arrive there before the content that it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def let_others_read(place: Path) -> None:
    """Give a weights file, or all weights files of a folder, the umask's mode: safetensors writes them as 0600."""
    mask = _umask()
    for file in place.rglob("*.safetensors") if place.is_dir() else [place]:
        file.chmod(0o666 & ~mask)


def _umask() -> int:
    """The process's umask. Where only setting it shows it, a file that another thread makes meanwhile has mode 0666."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    for line in lines:
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sha256_of(*files: Path, named_in: Path | None = None) -> str:
    """sha256 of the content of files, one after another; with `named_in` also of their names relative to it.

    Raises OSError.
    """
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            if named_in is not None:
                digest.update(path.relative_to(named_in).as_posix().encode())
            hashlib.file_digest(file, lambda: digest)  # by small blocks, whatever the file's size
    return digest.hexdigest()
