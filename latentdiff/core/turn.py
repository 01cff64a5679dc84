"""Threads that share one network take turns."""

from __future__ import annotations

from threading import RLock
from types import TracebackType


class Turn:
    """A reentrant lock; a copy of an object that has one gets a lock of its own."""

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


LOADING = Turn()  # transformers and peft change torch's classes while they make modules, which other threads would see
