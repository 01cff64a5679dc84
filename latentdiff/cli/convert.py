"""`latentdiff convert`: a model folder in another form."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Precision(StrEnum):
    """Of the weights on disk."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


def convert(
    model: Annotated[Path, typer.Argument(help="A model folder.")],
    output: Annotated[Path, typer.Argument(help="The new folder; it must not exist.")],
    dtype: Annotated[Precision, typer.Option(help="Precision of the weights.")] = Precision.float16,
) -> None:
    """Copy a model folder with its weights in another precision."""
    import torch

    from latentdiff.models.convert import convert_folder

    convert_folder(model, output, getattr(torch, dtype.value))
    typer.echo(output)
