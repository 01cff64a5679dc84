"""`python -m latentdiff` is the command `latentdiff`."""

import os
import sys

from latentdiff.cli import main


def run() -> None:
    """The command as a process.

    Without torch the process exits at once, because freeing compiled networks one by one takes a twelfth of the time
    of a picture. With torch it exits as usual: torch's libraries stop workers and remove files.
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
