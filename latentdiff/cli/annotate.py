"""`latentdiff annotate`: what a control sees of a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentdiff.cli import terminal
from latentdiff.core.annotators import ANNOTATORS


def annotate(
    picture: Annotated[Path, typer.Argument(help="A picture.")],
    kind: Annotated[str, typer.Option("--kind", "-k", help=f"One of {', '.join(ANNOTATORS)}.")] = "canny",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A new picture (default: beside it, NAME-KIND.png).")
    ] = None,
) -> None:
    """Write what a control would see of a picture: its edges, its colours, ..."""
    from latentdiff.core.files import write_new
    from latentdiff.drawing.files import check_file, encoded, open_picture
    from latentdiff.drawing.hints import hints_of

    target = output or picture.with_name(f"{picture.stem}-{kind}.png")
    check_file(target)
    (hint,) = hints_of(open_picture(picture), 1, annotated=kind)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_new(target, encoded(hint.picture(), target.suffix.lower(), None))
    terminal.result(target)
