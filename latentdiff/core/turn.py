"""Threads that share one network take turns."""

from __future__ import annotations

from threading import RLock
from types import TracebackType


class Turn:
    """A lock that is entered by one thread at a time, and again by the same one; a copied object gets its own."""

    def __init__(self) -> None:
        self._lock = RLock()

    def __enter__(self) -> Turn:
        self._lock.acquire()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lock.release()

    def __deepcopy__(self, memo: object) -> Turn:
        return Turn()

    def __reduce__(self) -> tuple[type[Turn], tuple[()]]:
        return Turn, ()
