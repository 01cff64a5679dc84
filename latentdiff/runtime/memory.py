"""Freed memory is kept for the next step instead of being given back to the system.

glibc maps every large block anew and unmaps it when it is freed. A training step on a CPU frees and asks for the same
gigabyte again and again: some 15,000 page faults a step of the default model, a tenth to a quarter of its time.
"""

from __future__ import annotations

import ctypes
import sys

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # malloc.h
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """For the rest of the process; True where the C library is one that can be told (glibc)."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(_MMAP_THRESHOLD, _LARGEST) and mallopt(_TRIM_THRESHOLD, _LARGEST))
