"""SIGTERM and SIGINT during training: stop at once if nothing would be lost, otherwise after the current step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from latentdiff.core.errors import Interrupted

FORWARDED = 0.5  # s; a launcher forwards a signal that the terminal has already sent to every process


class Interruption:
    """A block in which the first signal raises Interrupted, or inside `deferred()` only sets `received`.

    A second signal exits at once; an unfinished checkpoint then stays a temporary folder.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._since = 0.0
        self._deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self, defer: bool = True) -> Iterator[None]:
        """A block in which signals are noted and raised at its end; `deferred(False)` inside raises at once again."""
        before, self._deferred = self._deferred, defer
        try:
            self._raise_received()
            yield
        finally:
            self._deferred = before
        self._raise_received()

    def _raise_received(self) -> None:
        if self.received is not None and not self._deferred:
            raise Interrupted(self.received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if time.monotonic() - self._since > FORWARDED:
                os._exit(128 + number)
            return
        self.received, self._since = number, time.monotonic()
        if not self._deferred:
            raise Interrupted(number)


def leave_signals_to_the_parent(worker: int) -> None:
    """Ignore signals in a data loader's worker: a signal to the whole group reaches it, but the current step needs it.

    Workers end when the training process ends them or exits.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
