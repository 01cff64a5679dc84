"""Checkpoints on disk: safetensors, state.json and a manifest, in a folder that exists whole or not at all.

A folder is written as `.tmp-...`. Every file is flushed to the disk, MANIFEST.json (bytes and sha256 of each) last.
Then the folder is renamed, and only then older ones are deleted. After a kill at any moment, the newest folder whose
manifest agrees is good.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentdiff.core.errors import ModelError, ResourceError
from latentdiff.core.files import flush, let_others_read, sha256_of

Tensors = Mapping[str, Mapping[str, Tensor]]  # file name without ending -> tensor name -> tensor, on the CPU
Parts = Iterable[tuple[str, Mapping[str, Tensor]]]  # the same, yielded one after another
MANIFEST = "MANIFEST.json"


def save_checkpoint(directory: Path, parts: Parts, need: int, state: dict[str, Any], keep: int) -> Path:
    """Write `directory/step-XXXXXXXX` from state["step"], then delete all but the newest `keep` whole ones.

    need: the bytes of all parts. A folder of that name is moved aside, not overwritten. Raises ResourceError if the
    disk is full; then nothing of the new checkpoint is left, and all old ones are still there.
    """
    final = directory / f"step-{state['step']:08d}"
    partial = directory / f".tmp-{final.name}"
    with _disk_watched(directory, partial, need):
        directory.mkdir(parents=True, exist_ok=True)
        for left in directory.glob(".tmp-step-*"):  # left by a kill
            _remove(left)
        partial.mkdir()
        for name, tensors in parts:
            save_file(dict(tensors), partial / f"{name}.safetensors")
        (partial / "state.json").write_text(json.dumps(state, indent=1))
        _seal(partial)
        if final.exists():
            set_aside(final)
        partial.rename(final)
        flush(directory)
    for old in [path for path in checkpoints(directory) if not _missing_bytes(path)][:-keep]:
        if old != final:
            _remove(old)
    return final


def _remove(folder: Path) -> None:
    """Remove a folder with its files. Of a link only the link is removed."""
    if folder.is_symlink() or not folder.is_dir():
        folder.unlink()
    else:
        shutil.rmtree(folder)


def _seal(folder: Path) -> None:
    """Flush every file to the disk, then write the manifest."""
    files = sorted(folder.iterdir())
    let_others_read(folder)
    for file in files:
        flush(file)
    listed = {file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in files}
    (folder / MANIFEST).write_text(json.dumps(listed, indent=1))
    flush(folder / MANIFEST)
    flush(folder)


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, whole or damaged."""
    paths = [path for path in directory.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)]
    return sorted(paths, key=lambda path: int(path.name.removeprefix("step-")))


def label(path: Path) -> str:
    """The name of a checkpoint in messages: `step-30` for `step-00000030`."""
    return "step-" + (path.name.removeprefix("step-").lstrip("0") or "0")


def damage(path: Path) -> str | None:
    """The first fault of a checkpoint by its manifest; None if every byte is right."""
    try:
        if fault := _missing_bytes(path):
            return fault
        manifest = json.loads((path / MANIFEST).read_text())
        for name, entry in manifest.items():
            if sha256_of(path / name) != entry["sha256"]:
                return f"{name}: its content was changed"
    except OSError as error:
        return f"{(error.strerror or str(error)).lower()}"
    return None


def newest_whole(directory: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose manifest agrees, and a warning for each damaged one that is newer."""
    warnings: list[str] = []
    for path in reversed(checkpoints(directory)):
        if not (fault := damage(path)):
            notes = [f"{warning}; using {label(path)}" for warning in warnings]
            return path, notes
        warnings.append(f"checkpoint {label(path)} is damaged ({fault})")
    return None, warnings


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The tensors by file and the state of a whole checkpoint. Raises ModelError."""
    try:
        tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
        return tensors, load_state(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"checkpoint {path} cannot be read ({' '.join(str(error).split())[:200]})") from error


def load_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint, with checked numbers. Raises ModelError."""
    try:
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
        numbers = {"step": state["step"], "position": state["position"], **state["batching"]}
        numbers["micro_batch"] = state["micro_batch"]
        for name, number in numbers.items():
            least = 0 if name in ("step", "position") else 1
            if type(number) is not int or not least <= number < 2**48:
                raise ValueError(f"{name} is {number!r}"[:60])
        return state
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"checkpoint {path} is damaged (state.json: {str(error)[:80]})") from None


def check_whole(path: Path) -> None:
    """Raises ModelError for a damaged or missing checkpoint."""
    if not path.is_dir():
        raise ModelError(f"no checkpoint folder ({path}). Give a folder step-..., or latest, or auto")
    if fault := damage(path):
        raise ModelError(f"checkpoint {path} is damaged ({fault}). Use --resume latest for the newest whole one")


def set_aside(path: Path) -> Path:
    """Rename a checkpoint, so that the run ignores it."""
    number = next(n for n in range(1, 10**6) if not path.with_name(f"aside-{n}-{path.name}").exists())
    return path.rename(path.with_name(f"aside-{number}-{path.name}"))


def _missing_bytes(path: Path) -> str | None:
    """The first fault in names and sizes of files."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        sizes = {str(name): int(entry["bytes"]) for name, entry in manifest.items()}
        sums = [str(entry["sha256"]) for entry in manifest.values()]
    except FileNotFoundError:
        return f"no {MANIFEST}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} cannot be read"
    if not sums or any(Path(name).name != name for name in sizes):
        return f"{MANIFEST} lists no files"
    for name, size in sizes.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if (there := (path / name).stat().st_size) != size:
            return f"{name}: {there:,} of {size:,} bytes"
    return None


@contextmanager
def _disk_watched(directory: Path, partial: Path, need: int) -> Iterator[None]:
    """A block in which a full disk becomes one line with the last good checkpoint, and nothing partial is left."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        step = label(Path(partial.name.removeprefix(".tmp-")))
        number = error.errno if isinstance(error, OSError) else _os_error(error)
        if number not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ResourceError(f"cannot write {step} ({directory}: {' '.join(str(error).split())[:200]})") from error
        good, _ = newest_whole(directory)
        last = f"Last good: {label(good)}" if good else "There is no earlier one"
        free = shutil.disk_usage(directory).free
        sizes = f"need {need / 1e6:.1f} MB, {free / 1e6:.1f} MB free in {directory}"
        raise ResourceError(f"disk full while writing {step} ({sizes}). {last}") from error


def _os_error(error: SafetensorError) -> int | None:
    """The number of the system's error, which safetensors gives only as text."""
    match = re.search(r"\(os error (\d+)\)", str(error))
    return int(match[1]) if match else None
