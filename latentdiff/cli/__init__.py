"""The command line: one file a command, one line an error."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import typer

from latentdiff import __version__
from latentdiff.cli import convert, data, evaluate, generate, info, reproduce, runs, train
from latentdiff.errors import Interrupted, LatentDiffError, ResourceError

app = typer.Typer(
    name="latentdiff",
    help="Train, draw with and measure latent text-to-image diffusion models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("generate")(generate.generate)
app.command("train")(train.train)
app.command("runs")(runs.runs)
app.add_typer(evaluate.app, name="evaluate")
app.add_typer(data.app, name="data")
app.command("convert")(convert.convert)
app.command("info")(info.info)
app.command("reproduce")(reproduce.reproduce)


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


class _Terminated(BaseException):
    """SIGTERM, as an exception, so that what is half done is undone on the way out."""


def main() -> None:
    """Run the command line; errors are one line on stderr and an exit code (see `latentdiff.errors`)."""
    # libraries speak of loading in bars and tables of many lines; what they raise is told below
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "critical")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    signal.signal(signal.SIGTERM, _terminate)
    try:
        status = app(standalone_mode=False)
    except LatentDiffError as error:
        _fail(str(error), error.exit_code)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except _Terminated:
        _fail("terminated", 143)
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except MemoryError as error:
        _fail(f"out of memory {error}", ResourceError.exit_code)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        _fail(f"{(error.strerror or str(error)).lower()}{where}", ResourceError.exit_code)
    except Exception as error:
        _fail_as_told(error)
        raise
    if status == 130:
        _fail("interrupted", 130)
    sys.exit(status if isinstance(status, int) else 0)


def _fail_as_told(error: Exception) -> None:
    """What the command line's own parser says, and torch where memory ends; anything else is a bug, left alone."""
    if usage := getattr(error, "format_message", None):
        _fail(usage(), 2)
    # a class of its own on a GPU, on a CPU only the words of a RuntimeError
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
        _fail("out of memory. Fewer or smaller pictures at once need less", ResourceError.exit_code)


def _terminate(number: int, frame: Any) -> None:
    raise _Terminated


def _fail(message: str, code: int) -> None:
    if message.strip():  # help that was shown instead has none
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
