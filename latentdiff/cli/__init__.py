"""The command line: one file a command, one line an error."""

from __future__ import annotations

import os
import sys

import typer
from typer._click.exceptions import ClickException

from latentdiff import __version__
from latentdiff.cli import convert, evaluate, generate, info, train
from latentdiff.errors import LatentDiffError

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
app.add_typer(evaluate.app, name="evaluate")
app.command("convert")(convert.convert)
app.command("info")(info.info)


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line; errors are one line on stderr and an exit code (see `latentdiff.errors`)."""
    # libraries speak of loading in bars and tables of many lines; what they raise is told below
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        status = app(standalone_mode=False)
    except LatentDiffError as error:
        _fail(str(error), error.exit_code)
    except ClickException as error:
        _fail(error.format_message(), 2)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 130)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, code: int) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
