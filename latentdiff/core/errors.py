"""The errors a user can cause, each with the exit code that the command line returns for it."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path


class LatentDiffError(Exception):
    """One line: what is wrong and what to do. The command line prints it and exits with `exit_code`."""

    exit_code = 2


class ConfigError(LatentDiffError):
    """An argument or a configuration value that cannot be used."""

    exit_code = 2


class DataError(LatentDiffError):
    """A data set that cannot be read or lacks something that was requested."""

    exit_code = 3


class ModelError(LatentDiffError):
    """A model folder or checkpoint that is missing, damaged or of the wrong kind."""

    exit_code = 4


class NonFiniteError(LatentDiffError):
    """NaN or infinity where a number is required; `samples` names where it came from, if known."""

    exit_code = 5

    def __init__(self, message: str, samples: Sequence[str] = ()):
        super().__init__(message)
        self.samples = list(samples)


class ResourceError(LatentDiffError):
    """Not enough disk or memory."""

    exit_code = 6


class UnsafeError(LatentDiffError):
    """A file that would run code: a pickle, or a model folder with a program in it."""

    exit_code = 7


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived; `saved` names the step that was saved because of it, if any."""

    def __init__(self, number: int, saved: str | None = None):
        name = signal.Signals(number).name
        super().__init__(
            f"saved {saved} after {name}" if saved else f"error: stopped by {name}. Run the same command to resume"
        )
        self.exit_code = 128 + number


TOO_LARGE = "out of memory. Draw fewer or smaller pictures at once"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: torch has an error of its own for a GPU, and for a CPU one with these words."""
    is_named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return is_named or "can't allocate memory" in str(error)


@contextmanager
def raised_as(kind: type[LatentDiffError], what: str) -> Iterator[None]:
    """Turn any error of a library into one line, `what: reason`. Our own errors pass."""
    try:
        yield
    except LatentDiffError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise kind(f"{what}: {reason}") from error


def loading(part: str | Path, directory: Path | None = None) -> AbstractContextManager[None]:
    """Turn any error of a library that reads a file, or a part of a folder, into a ModelError of one line."""
    return raised_as(ModelError, f"cannot load {part}" + (f" ({directory})" if directory else ""))


def saving(part: str, directory: Path) -> AbstractContextManager[None]:
    """Turn any error of a library that writes a part, often a full disk, into a ResourceError of one line."""
    return raised_as(ResourceError, f"cannot write {part} ({directory})")
