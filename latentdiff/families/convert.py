"""A model folder in another precision: safetensors files are rewritten; JSON, text and GGUF files are copied."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors import safe_open

from latentdiff.core.errors import ConfigError, loading, saving
from latentdiff.core.files import atomic, write_json
from latentdiff.families import check_folder
from latentdiff.families.card import FILE as CARD_FILE
from latentdiff.families.card import known_words
from latentdiff.formats.folder import folder_hash, read_json
from latentdiff.formats.tensors import write_tensors

_COPIED = (".json", ".txt", ".md", ".gz", ".gguf")


def convert_folder(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Write the model folder `source` to `target` with its floating-point weights in `dtype`.

    float16 halves the bytes. `target` appears whole or not at all. Raises ConfigError if it exists or a weight is too
    large for `dtype`, ModelError and UnsafeError for a bad `source`.
    """
    check_folder(source)
    known_words(source)
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{target} exists; nothing is overwritten")
    if target.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"{target} lies inside {source}. Choose another folder")
    with atomic(target) as made:
        for file in sorted(file for file in source.rglob("*") if file.is_file()):
            copy = made / file.relative_to(source)
            if file.suffix == ".safetensors":
                _convert_file(file, copy, dtype)
            elif file.suffix in _COPIED:
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
        if "weights" in (card := read_json(made / CARD_FILE) if (made / CARD_FILE).is_file() else {}):
            write_json(made / CARD_FILE, card | {"weights": folder_hash(made)})


def _convert_file(source: Path, target: Path, dtype: torch.dtype) -> None:
    with loading(source), safe_open(source, "pt") as weights:
        metadata, state = weights.metadata(), {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    for name, tensor in state.items():
        if tensor.is_floating_point():
            state[name] = tensor.to(dtype)
            if not (torch.isfinite(state[name]) == torch.isfinite(tensor)).all():
                raise ConfigError(f"{name} of {source} does not fit {str(dtype).removeprefix('torch.')}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with saving(f"{source.parent.name}/{target.name}", target.parent):
        write_tensors(state, target, metadata)
