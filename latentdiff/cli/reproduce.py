"""`latentdiff reproduce`: a picture drawn again from its record."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentdiff.cli import terminal
from latentdiff.cli.options import Runtime


def reproduce(
    image: Annotated[Path, typer.Argument(help="A picture that latentdiff made.")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="The model, if it has moved.")] = None,
    source: Annotated[
        list[Path] | None,
        typer.Option(help="A file or folder with the pictures and adapters that it was drawn from; may be repeated."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File for the new picture.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... (default: cuda where there is one).")] = None,
    runtime: Annotated[Runtime | None, typer.Option(help="Runtime, if not the one that drew it.")] = None,
) -> None:
    """Draw a picture again and compare it with the file.

    Exits with 1 if they differ. The files that it was drawn from must have the hashes in its record.
    """
    from latentdiff.core.files import write_new
    from latentdiff.drawing import reproduce as again
    from latentdiff.drawing.files import check_file, encoded
    from latentdiff.pipeline import LatentDiffusionPipeline

    if output is not None:
        check_file(output)
    picture, likeness = again.reproduce(
        image, LatentDiffusionPipeline.from_pretrained, model, source or [], device, runtime and runtime.value
    )
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_new(output, encoded(picture, output.suffix.lower(), None))
    terminal.result(likeness)
    if not likeness.equal:
        raise typer.Exit(1)
