"""Choices that several commands offer."""

from enum import StrEnum


class Precision(StrEnum):
    """Of arithmetic, or of weights on disk; torch's names."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"
