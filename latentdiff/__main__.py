"""`python -m latentdiff` is the command `latentdiff`."""

import os
import sys

from latentdiff.cli import main


def run() -> None:
    """The command as a process.

    Without torch, whose libraries have workers and files to put away, it ends at once: to free compiled networks one by
    one before the system frees all takes a twelfth of the time that a picture takes.
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
