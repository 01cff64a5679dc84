"""`latentdiff annotate`: what a control sees of a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentdiff.cli import terminal
from latentdiff.core.annotators import ANNOTATORS
from latentdiff.core.errors import ConfigError


def annotate(
    picture: Annotated[Path, typer.Argument(help="A picture.")],
    kind: Annotated[str, typer.Option("--kind", "-k", help=f"One of {', '.join(ANNOTATORS)}.")] = "canny",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A new picture (default: beside it, NAME-KIND.png).")
    ] = None,
) -> None:
    """Write what a control would see of a picture: its edges, its colours, ..."""
    from latentdiff.core.files import write_new
    from latentdiff.drawing.files import encoded, open_picture, suffix_of
    from latentdiff.drawing.hints import hints_of

    (hint,) = hints_of(open_picture(picture), 1, annotated=kind)
    target = output or picture.with_name(f"{picture.stem}-{kind}.png")
    if (suffix := suffix_of(target)) is None:
        raise ConfigError(f"--output must be a picture, like edges.png (got {target})")
    write_new(target, encoded(hint.picture(), suffix, None))
    terminal.result(target)
