"""SIGTERM and SIGINT while training: at once where nothing would be lost, otherwise after the step in hand."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from latentdiff.core.errors import Interrupted

FORWARDED = 0.5  # s; launchers forward a signal that the terminal sent to everybody: one wish, told twice


class Interruption:
    """While entered, the first signal raises Interrupted, or inside `deferred()` is only noted in `received`.

    A second signal exits at once; a checkpoint that is being written then stays a temporary folder.
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
        """Note a signal instead of raising, until the end at the latest; `deferred(False)` inside raises again."""
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
    """For a data loader's workers: a signal to the whole group reaches them too, and the step in hand needs them.

    They end when the training process says so, or is no more.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
