"""A store of tensors that are expensive to compute, rows by key, in safetensors files that are never changed.

A file holds rows of one shape, with their keys in its header. Its name is the sha256 of its bytes: a damaged file is
noticed when the store is opened, and two writers of the same rows agree. An interrupted writer leaves only a file whose
name begins with a dot. Files are memory-mapped: a row that is never read takes no memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from latentdiff.core.errors import DataError, ResourceError
from latentdiff.core.files import flush, let_others_read, scratch, sha256_of


class Store:
    """Rows by keys of 32 hexadecimal digits. Raises DataError for a damaged file."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._files: dict[Path, dict[str, Tensor]] = {}
        self._where: dict[str, tuple[Path, int]] = {}
        self.refresh()

    def __len__(self) -> int:
        return len(self._where)

    def refresh(self) -> None:
        """Read files that other processes have added."""
        new = [path for path in sorted(self._directory.glob("[!.]*.safetensors")) if path not in self._files]
        with ThreadPoolExecutor() as pool:
            for path, digest in zip(new, pool.map(sha256_of, new), strict=True):
                if digest != path.stem:
                    raise _damaged(path)
                self._map(path)

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The keys without a row, each once, in order."""
        return [key for key in dict.fromkeys(keys) if key not in self._where]

    def rows(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """Tensors (len(keys), ...) by name; the rows must have one shape. Raises DataError for a key without a row."""
        try:
            places = [(self._files[path], row) for path, row in map(self._where.__getitem__, keys)]
        except KeyError as error:
            raise DataError(
                f"{self._directory} has no row {error.args[0]}. Run the same command to make it again"
            ) from None
        return {name: torch.stack([tensors[name][row] for tensors, row in places]) for name in places[0][0]}

    def add(self, keys: Sequence[str], tensors: dict[str, Tensor]) -> None:
        """Write rows (N, ...), whole or not at all. Raises ResourceError if the disk is full."""
        try:
            with scratch(self._directory) as unfinished:
                made = unfinished / "rows.safetensors"
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, made, _header(keys))
                flush(made)
                let_others_read(made)
                path = made.rename(self._directory / f"{sha256_of(made)}.safetensors")
        except (OSError, SafetensorError) as error:
            raise ResourceError(f"cannot write to {self._directory} ({error}). The rows before are kept") from error
        self._map(path)

    def _map(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                keys = json.loads((file.metadata() or {})["keys"])
                self._files[path] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            places = {key: (path, row) for row, key in enumerate(keys)}
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            raise _damaged(path) from error
        for key, place in places.items():
            self._where.setdefault(key, place)


def _header(keys: Sequence[str]) -> dict[str, str]:
    return {"keys": json.dumps(list(keys))}


def _damaged(path: Path) -> DataError:
    return DataError(f"cached rows are damaged ({path}). Delete the file; they are made again")
