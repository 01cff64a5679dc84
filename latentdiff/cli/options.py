"""Choices that several commands offer."""

from enum import StrEnum
from pathlib import Path

OUTPUTS = Path("outputs")  # the folder of what is drawn


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


class Quantized(StrEnum):
    """The kind of weights with fewer bits; see runtime/quantized.py and runtime/compressed.py."""

    int8 = "int8"
    int4 = "int4"
    fp8 = "fp8"
    q8_0 = "q8_0"
    q4_0 = "q4_0"


class Precision(StrEnum):
    """The precision of arithmetic, or of weights on disk; torch's names."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"
