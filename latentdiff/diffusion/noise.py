"""Randomness as a function of its key: (seed, purpose, index, step) -> numbers.

Nothing here has state. The generator is Philox4x64-10 (Salmon et al. 2011), which is counter-based: the
key is (seed, purpose) and the counter starts at (0, index, step, 0), so draws with different keys never
overlap (each has 2^64 blocks of its own) and no draw depends on the order, the batch, the worker or the
device of another.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

MAX_SEED = 2**64 - 1


@lru_cache(maxsize=256)
def _purpose_key(purpose: str) -> int:
    return int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")


def generator(seed: int, purpose: str, index: int = 0, step: int = 0) -> np.random.Generator:
    """A NumPy generator for one key; seed, index and step are in [0, 2^64)."""
    key = np.array([seed, _purpose_key(purpose)], dtype=np.uint64)
    counter = np.array([0, index, step, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def normal(shape: tuple[int, ...], seed: int, purpose: str, index: int = 0, step: int = 0) -> NDArray[np.float32]:
    """Standard normal draws, float32, of the given shape."""
    return generator(seed, purpose, index, step).standard_normal(shape, dtype=np.float32)


def permutation(count: int, seed: int, purpose: str, epoch: int = 0) -> NDArray[np.int64]:
    """A random order of range(count) for one epoch."""
    return generator(seed, purpose, step=epoch).permutation(count)
