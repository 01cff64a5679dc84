"""Plain safetensors files."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from latentdiff.core.errors import loading
from latentdiff.formats.pickle import refuse_pickle


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by name. Raises ModelError, UnsafeError."""
    with loading(file.name, file.parent):
        refuse_pickle(file)
        return load_file(file)
