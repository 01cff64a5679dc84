"""Learnt words as files: `learned_embeds.safetensors` holds {word: (D,) or (n, D)}, for SDXL `clip_l` and `clip_g`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from latentdiff.core.errors import ModelError, loading, saving
from latentdiff.core.files import atomic
from latentdiff.formats.pickle import check_safetensors
from latentdiff.formats.tensors import widened

FILE = "learned_embeds.safetensors"


def read_words(path: Path) -> tuple[Path, dict[str, Tensor]]:
    """The file (`path` itself, or the one in this folder) and its tensors. Raises ModelError, UnsafeError."""
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise ModelError(f"no embeddings at {path}. Give a .safetensors file, or a folder with {FILE}")
    check_safetensors(file)
    with loading(file):
        return file, {name: widened(tensor) for name, tensor in load_file(file).items()}


def save_word(vectors: Mapping[str, Tensor], folder: Path, word: str) -> Path:
    """Write learned_embeds.safetensors, {word: (n, D)}; for SDXL clip_l and clip_g, in a file named after the word."""
    path = folder / (FILE if word in vectors else f"{word}.safetensors")
    with saving(path.name, folder), atomic(path) as made:
        save_file({name: tensor.detach().float().cpu().contiguous() for name, tensor in vectors.items()}, made)
    return path
