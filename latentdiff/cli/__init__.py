"""The command line: one file a command, one line an error."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from functools import cache
from types import FrameType
from typing import Any

import typer

from latentdiff import __version__
from latentdiff.cli import (
    annotate,
    convert,
    data,
    evaluate,
    finetune,
    generate,
    info,
    reproduce,
    runs,
    serve,
    show,
    terminal,
    train,
)
from latentdiff.core.errors import TOO_LARGE, Interrupted, LatentDiffError, ResourceError, is_out_of_memory

app = typer.Typer(
    name="latentdiff",
    help="Train latent text-to-image diffusion models, draw with them, measure them.",
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
app.add_typer(show.app, name="show")
app.command("convert")(convert.convert)
app.command("annotate")(annotate.annotate)
app.command("info")(info.info)
app.command("reproduce")(reproduce.reproduce)
app.command("serve")(serve.serve)


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        terminal.result(__version__)
        raise typer.Exit


class _Terminated(BaseException):
    """SIGTERM as an exception, so that unfinished files are removed."""


@cache
def _command() -> Any:
    return typer.main.get_command(app)


def main() -> None:
    """Run the command line; errors are one line on stderr and an exit code (see `latentdiff.core.errors`)."""
    # libraries print bars and tables while loading; their errors are printed below
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "critical")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.showwarning = lambda message, *_, **__: terminal.warning(message)
    _catch_signals()
    try:
        status = _command()(prog_name="latentdiff", standalone_mode=False)
    except LatentDiffError as error:
        _fail(str(error), error.exit_code)
    except Interrupted as stopped:
        terminal.note(stopped)
        sys.exit(stopped.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except _Terminated:
        _fail("terminated", 143)
    except BrokenPipeError:  # the reader of our output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except MemoryError as error:
        _fail(f"out of memory {error}", ResourceError.exit_code)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        _fail(f"{(error.strerror or str(error)).lower()}{where}", ResourceError.exit_code)
    except Exception as error:
        _fail_by_message(error)
        raise
    if status == 130:
        _fail("interrupted", 130)
    sys.exit(status if isinstance(status, int) else 0)


def _fail_by_message(error: Exception) -> None:
    """Print errors of the command line's parser, and torch's out of memory; any other error is a bug and is raised."""
    if usage := getattr(error, "format_message", None):
        if type(error).__name__ == "NoArgsIsHelpError":  # a command without arguments prints its help
            terminal.note(*usage().split("\n"))
            sys.exit(2)
        _fail(usage().replace("Input should be ", "must be ").replace("greater than or equal to", "at least"), 2)
    if is_out_of_memory(error):
        _fail(TOO_LARGE, ResourceError.exit_code)


def _catch_signals() -> None:
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a shell sets this for commands in the background
        signal.signal(signal.SIGINT, _interrupt)


def _terminate(number: int, frame: Any) -> None:
    _leave_an_import(frame, "terminated", 143)
    raise _Terminated


def _interrupt(number: int, frame: Any) -> None:
    _leave_an_import(frame, "interrupted", 130)
    raise KeyboardInterrupt


def _leave_an_import(frame: FrameType | None, message: str, code: int) -> None:
    """Exit at once if an import is running: libraries abort or swallow exceptions inside one."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            os.write(2, f"error: {message}\n".encode())
            os._exit(code)
        frame = frame.f_back


def _fail(message: str, code: int) -> None:
    terminal.error(message)
    sys.exit(code)
