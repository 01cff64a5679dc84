"""A model folder in another precision: every safetensors file rewritten, everything else copied."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from latentdiff.errors import ConfigError
from latentdiff.models.weights import check_folder


def convert_folder(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Write the model folder `source` to `target` with its floating-point weights in `dtype`.

    Half the bytes in float16; networks are loaded as float32 again unless told otherwise. Raises ConfigError where
    `target` exists or a weight is too large for `dtype`, ModelError and UnsafeError for a bad `source`.
    """
    check_folder(source)
    if target.exists():
        raise ConfigError(f"{target} exists; nothing is overwritten")
    unfinished = target.with_name(target.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(source, unfinished, ignore=shutil.ignore_patterns("*.safetensors"))
    try:
        for file in sorted(source.rglob("*.safetensors")):
            _convert_file(file, unfinished / file.relative_to(source), dtype)
    except BaseException:
        shutil.rmtree(unfinished)
        raise
    unfinished.rename(target)


def _convert_file(source: Path, target: Path, dtype: torch.dtype) -> None:
    with safe_open(source, "pt") as weights:
        metadata, state = weights.metadata(), {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    for name, tensor in state.items():
        if tensor.is_floating_point():
            state[name] = tensor.to(dtype)
            if not (torch.isfinite(state[name]) == torch.isfinite(tensor)).all():
                raise ConfigError(f"{name} of {source} does not fit {str(dtype).removeprefix('torch.')}")
    save_file(state, target, metadata)
