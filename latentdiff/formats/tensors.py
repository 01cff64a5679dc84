"""Tensors as files have them."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from latentdiff.core.errors import loading
from latentdiff.formats.pickle import check_safetensors


def widened(tensor: Tensor) -> Tensor:
    """An 8-bit floating-point tensor in float16, which holds all its values; others as they are."""
    return tensor.half() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by name. Raises ModelError, UnsafeError."""
    with loading(file.name, file.parent):
        check_safetensors(file)
        return load_file(file)
