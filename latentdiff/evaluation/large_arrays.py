"""Arrays of many pictures: in memory, or in a file without a name, which the system reads and writes as needed."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
from numpy.typing import NDArray

IN_MEMORY = 2**30  # bytes
CODED, DRAWN = 2**20, 2**21  # pixels of a batch that fit into memory, for an autoencoder in float32 or a drawing model


def batch_size(pixels: int, size: Sequence[int], most: int) -> int:
    """The number of pictures of `size`, (height, width), that have so many pixels together, from 1 to `most`."""
    return max(1, min(most, pixels // math.prod(size)))


def allocate(shape: tuple[int, ...], folder: Path | None = None) -> NDArray[np.uint8]:
    """A uint8 array of zeros; above IN_MEMORY bytes it is on the folder's disk, as long as it is used.

    Raises OSError if the disk is too small, before anything is written.
    """
    size = math.prod(shape)
    if folder is None or size <= IN_MEMORY:
        return np.zeros(shape, np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):  # writing to a mapped file on a full disk would kill the process
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
        return np.ndarray(shape, np.uint8, mmap.mmap(file.fileno(), size))


def concatenated(batches: Iterable[np.ndarray], count: int, folder: Path | None = None) -> NDArray[np.uint8]:
    """One array (count, ...) of batches (B, ...)."""
    rows: Iterator[np.ndarray] = iter(batches)
    first = next(rows)
    whole = allocate((count, *first.shape[1:]), folder)
    whole[: len(first)], at = first, len(first)
    for some in rows:
        whole[at : at + len(some)] = some
        at += len(some)
    return whole
