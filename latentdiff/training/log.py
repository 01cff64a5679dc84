"""The log of a run: `log.jsonl`, one JSON object a line, and the same numbers as TensorBoard events."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from latentdiff.core.errors import ResourceError
from latentdiff.core.files import write_text

LOG = "log.jsonl"


class Log:
    """Appends to a run's log after removing lines beyond step `start`, so that each step is logged once."""

    def __init__(self, directory: Path, start: int):
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        directory.mkdir(parents=True, exist_ok=True)
        self._path = path = directory / LOG
        kept = [line for line in read_log(path) if line["step"] <= start]
        write_text(path, "".join(f"{json.dumps(line)}\n" for line in kept))
        self.reported = {line["step"] for line in kept if "loss" not in line}
        self._file = path.open("a", buffering=1)
        self._events = SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1)

    def write(self, step: int, numbers: dict[str, float], prefix: str) -> None:
        """Write one line; TensorBoard's names are `prefix/name`."""
        try:
            self._file.write(json.dumps({"step": step, **numbers}) + "\n")
        except OSError as error:
            raise ResourceError(f"cannot write {self._path} ({error.strerror}). The checkpoints are whole") from error
        for name, number in numbers.items():
            self._events.add_scalar(f"{prefix}/{name}", number, step)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with suppress(OSError):  # the disk is full, which `write` has reported
            self._file.close()
        self._events.close()


def last_rate(directory: Path, step: int) -> float | None:
    """The learning rate that a run had reached by a step; None if its log does not say."""
    for line in reversed(read_log(directory / LOG)):
        if 0 < line["step"] <= step and "loss" in line:
            rate = line.get("learning_rate")
            return float(rate) if isinstance(rate, int | float) and math.isfinite(rate) else None
    return None


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, each with a `step` of 0 or more; none without a file.

    A line that a kill cut off, or one of another format, is left out.
    """
    texts = path.read_text(errors="replace").splitlines() if path.is_file() else []
    lines = []
    for text in texts:
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            line = json.loads(text)
            if type(line["step"]) is int and line["step"] >= 0:
                lines.append(line)
    return lines
