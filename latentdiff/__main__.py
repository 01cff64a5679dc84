"""`python -m latentdiff` is the command `latentdiff`."""

import os
import sys

from latentdiff.cli import main


def run() -> None:
    """The command as a process.

    Unless torch is loaded, whose libraries must stop workers and remove files, the process exits at once: freeing
    compiled networks one by one would take a twelfth of the time of a picture.
    """
    try:
        main()
    except SystemExit as stop:
        if "torch" in sys.modules or not isinstance(stop.code, int):
            raise
        sys.stderr.flush()
        os._exit(stop.code)


if __name__ == "__main__":
    run()
