"""`latentdiff reproduce`: a picture made again from what it says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentdiff.cli.options import Runtime


def reproduce(
    image: Annotated[Path, typer.Argument(help="A picture that latentdiff made.")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="Its model, if not where it was.")] = None,
    source: Annotated[
        list[Path] | None, typer.Option(help="A file or folder with what it was drawn from: pictures, adapters.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where the new picture goes.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... (default: cuda where there is one).")] = None,
    runtime: Annotated[Runtime | None, typer.Option(help="Instead of the one it was drawn with.")] = None,
) -> None:
    """Draw a picture again and say how equal it is.

    Exits with 1 where it is not. Files that it names must have the content that it names.
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
        write_new(output, encoded(picture, output.suffix.lower(), None))
    typer.echo(likeness)
    if not likeness.equal:
        raise typer.Exit(1)
