"""Choices that several commands offer."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

OUTPUTS = Path("outputs")  # the folder of pictures
A_MODEL = "A folder, a .safetensors file or a hub id (default: the model that comes with the package)."
Model = Annotated[str | None, typer.Option("--model", "-m", help=A_MODEL)]


class Runtime(StrEnum):
    """The library that networks compute with; see runtime/choice.py."""

    auto = "auto"
    torch = "torch"
    openvino = "openvino"


class Speed(StrEnum):
    """The speed of the networks; see latentdiff/runtime/speed.py."""

    exact = "exact"
    fast = "fast"
    max = "max"


class Precision(StrEnum):
    """The precision of arithmetic, or of weights on disk; torch's names."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"
