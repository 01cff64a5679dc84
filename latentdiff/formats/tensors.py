"""Tensors read from files and written; 8-bit floats are widened and multiplied by their scales."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentdiff.core.errors import ModelError, loading
from latentdiff.formats.pickle import check_safetensors

_SCALES = ("scale_weight", "weight_scale")  # one number for a whole weight, in ComfyUI's old and new names
_ALL = "scaled_fp8"  # says that all weights have scales
_BESIDE = (*_SCALES, _ALL, "scale_input", "input_scale", "comfy_quant")  # what else stands beside a weight


def widened(tensor: Tensor) -> Tensor:
    """An 8-bit floating-point tensor in float16, which holds all its values; others as they are."""
    return tensor.half() if _is_float8(tensor) else tensor


def unscaled(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors without those that only say how others are stored; float8 ones are multiplied by their scales.

    ComfyUI writes X.weight in float8 beside one number, X.scale_weight or X.weight_scale. The product is bfloat16, in
    which such models were trained. Raises ModelError for scales of blocks, and for weights of other kinds.
    """
    numbers = {name: tensor for name, tensor in state.items() if not name.endswith(_BESIDE)}
    scaled: set[str] = set()
    for name, scale in state.items():
        ending = next((ending for ending in _BESIDE if name.endswith(ending)), None)
        if ending is None or name == _ALL:
            continue
        owner = name.removesuffix(ending) + "weight"
        narrow = state.get(owner)
        if narrow is None or not _is_float8(narrow) or (ending in _SCALES and scale.numel() != 1):
            raise ModelError(f"weights with scales of their own are supported for float8 alone ({name})")
        if ending in _SCALES:
            if not torch.isfinite(scale.float()).all() or owner in scaled:
                raise ModelError(f"{owner} requires one scale, a finite number ({name})")
            scaled.add(owner)
            numbers[owner] = (narrow.float() * scale.float()).bfloat16()
    narrow_ones = {name for name, tensor in numbers.items() if _is_float8(tensor) and name.endswith("weight")}
    if (scaled or _ALL in state) and narrow_ones - scaled:
        raise ModelError(f"{min(narrow_ones - scaled)} has no scale, which others have")
    return {name: widened(tensor) for name, tensor in numbers.items()}


def _is_float8(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() == 1


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by name. Raises ModelError, UnsafeError."""
    with loading(file.name, file.parent):
        check_safetensors(file)
        return load_file(file)


def write_tensors(state: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a file whose bytes depend on its content alone: safetensors itself shuffles the entries of the metadata."""
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file, dict(metadata) if metadata else None)
    if not metadata:
        return
    with file.open("r+b") as written:
        length = int.from_bytes(written.read(8), "little")
        header = json.loads(written.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        assert len(text) == length, "the same JSON in another order"
        written.seek(8)
        written.write(text)
