"""Room for many pictures: in memory, or in a file without a name, whose parts the system keeps in memory or not."""

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
CODED, DRAWN = 2**20, 2**21  # pixels that an autoencoder in float32, or a model that draws, has room for at once


def at_once(pixels: int, size: Sequence[int], most: int) -> int:
    """How many pictures of (height, width) are that many pixels: from 1 to `most`."""
    return max(1, min(most, pixels // math.prod(size)))


def room(shape: tuple[int, ...], folder: Path | None = None) -> NDArray[np.uint8]:
    """uint8 of a shape, to be filled; what is larger than IN_MEMORY lies on the folder's disk as long as it is used.

    Raises OSError where the disk has not that much: before anything is written to it.
    """
    size = math.prod(shape)
    if folder is None or size <= IN_MEMORY:
        return np.zeros(shape, np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):  # a disk that is full later would end the process
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
        return np.ndarray(shape, np.uint8, mmap.mmap(file.fileno(), size))


def filled(batches: Iterable[np.ndarray], count: int, folder: Path | None = None) -> NDArray[np.uint8]:
    """Batches (B, ...) of rows of one shape as one array (count, ...)."""
    rows: Iterator[np.ndarray] = iter(batches)
    first = next(rows)
    whole = room((count, *first.shape[1:]), folder)
    whole[: len(first)], at = first, len(first)
    for some in rows:
        whole[at : at + len(some)] = some
        at += len(some)
    return whole
