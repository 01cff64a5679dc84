"""What the command line prints: the only place that writes to the terminal, one printable line at a time.

Results go to standard output, everything else to standard error. Names in files of others are part of many messages;
here, and only here, they are made printable.
"""

from __future__ import annotations

import sys

from latentdiff.core.text import one_line, printable


def result(*lines: object) -> None:
    """Print lines of the command's result, each at once: a path in a pipe must not be lost if the command fails."""
    for line in lines:
        print(printable(line), flush=True)


def note(*messages: object) -> None:
    """Print lines beside the result."""
    for message in messages:
        print(one_line(message), file=sys.stderr)


def warning(message: object) -> None:
    """Print a warning; the command goes on."""
    note(f"warning: {one_line(message)}")


def error(message: object) -> None:
    """Print why the command stops."""
    note(f"error: {one_line(message)}")
