"""The command line: one file a command, one line an error."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from types import FrameType
from typing import Any

import typer

from latentdiff import __version__
from latentdiff.cli import convert, data, evaluate, finetune, generate, info, reproduce, runs, train
from latentdiff.core.errors import Interrupted, LatentDiffError, ResourceError

app = typer.Typer(
    name="latentdiff",
    help="Train, draw with and measure latent text-to-image diffusion models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    # both --train-batch-size and --train_batch_size, as diffusers' scripts have it
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda word: word.replace("_", "-"),
    },
)
app.command("generate")(generate.generate)
app.command("train")(train.train)
app.command("finetune")(finetune.finetune)
app.command("runs")(runs.runs)
app.command("evaluate")(evaluate.evaluate)
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
    """Run the command line; errors are one line on stderr and an exit code (see `latentdiff.core.errors`)."""
    # libraries speak of loading in bars and tables of many lines; what they raise is told below
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "critical")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.showwarning = lambda message, *_, **__: _warn(message)
    _catch_signals()
    try:
        status = app(prog_name="latentdiff", standalone_mode=False)
        sys.stdout.flush()
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
        if type(error).__name__ == "NoArgsIsHelpError":  # a command alone: what it says is the help
            print(usage(), file=sys.stderr)
            sys.exit(2)
        _fail(usage(), 2)
    # a class of its own on a GPU, on a CPU only the words of a RuntimeError
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
        _fail("out of memory. Fewer or smaller pictures at once need less", ResourceError.exit_code)


def _warn(message: Warning | str) -> None:
    """One line, as all that is told on standard error."""
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def _catch_signals() -> None:
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as a shell sets it for what runs in the background
        signal.signal(signal.SIGINT, _interrupt)


def _terminate(number: int, frame: Any) -> None:
    _leave_an_import(frame, "terminated", 143)
    raise _Terminated


def _interrupt(number: int, frame: Any) -> None:
    _leave_an_import(frame, "interrupted", 130)
    raise KeyboardInterrupt


def _leave_an_import(frame: FrameType | None, message: str, code: int) -> None:
    """Leave at once in the midst of an import: libraries abort, or swallow it, where one is broken off."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            os.write(2, f"error: {message}\n".encode())
            os._exit(code)
        frame = frame.f_back


def _fail(message: str, code: int) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
