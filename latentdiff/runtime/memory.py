"""Freed memory stays with the process for the next step instead of returning to the system.

glibc maps every large block when it is allocated and unmaps it when it is freed. A training step on a CPU allocates and
frees the same gigabyte: some 15,000 page faults a step of the default model, a tenth to a quarter of its time.
"""

from __future__ import annotations

import ctypes
import sys

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # malloc.h
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Keep freed memory for the rest of the process. True if the C library has this setting (glibc)."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(_MMAP_THRESHOLD, _LARGEST) and mallopt(_TRIM_THRESHOLD, _LARGEST))
