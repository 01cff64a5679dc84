"""Choices that several commands offer."""

from enum import StrEnum


class Runtime(StrEnum):
    """What networks compute with; see runtime/choice.py."""

    auto = "auto"
    torch = "torch"
    openvino = "openvino"


class Speed(StrEnum):
    """How far networks are changed to be faster; see latentdiff/runtime/speed.py."""

    exact = "exact"
    fast = "fast"
    max = "max"


class Precision(StrEnum):
    """Of arithmetic, or of weights on disk; torch's names."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"
