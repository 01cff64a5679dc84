"""A pickle's tensors as safetensors, read in a process of its own: `python -m latentdiff.models.unpickle FROM TO`.

torch reads it with weights_only, which builds tensors and plain containers and calls nothing else. The process has
nothing to lose: it writes one new file and ends.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from latentdiff.errors import ModelError, UnsafeError

_NESTS = ("state_dict", "model", "string_to_param")  # where checkpoints keep their tensors
_REFUSED = 7


def unpickled(source: Path, target: Path) -> None:
    """Write the tensors of a pickle to a new safetensors file. Raises UnsafeError for one that would run code."""
    words = [sys.executable, "-m", "latentdiff.models.unpickle", str(source), str(target)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=3600, check=False)
    told = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
    if done.returncode == _REFUSED:
        raise UnsafeError(f"{source} asks for more than tensors ({told[0]}). latentdiff never loads that")
    if done.returncode:
        raise ModelError(f"cannot read the pickle {source}: {told[0][:200]}")


def tensors_of(tree: Any) -> dict[str, Tensor]:
    """The tensors of a checkpoint by their names."""
    while isinstance(tree, dict) and (nest := next((n for n in _NESTS if isinstance(tree.get(n), dict)), None)):
        tree = {"emb_params": next(iter(tree[nest].values()))} if nest == "string_to_param" else tree[nest]
    found = dict(_named(tree, ""))
    if not found:
        raise ValueError("it holds no tensors")
    return found


def _named(tree: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield prefix.removesuffix("."), tree.detach().clone().contiguous()  # tensors that share memory are apart here
    elif isinstance(tree, dict):
        for name, value in tree.items():
            yield from _named(value, f"{prefix}{name}.")


def main(source: str, target: str) -> int:
    """The child process; returns its exit code."""
    import pickle

    try:
        tree = torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        print(" ".join(str(error).split())[:200], file=sys.stderr)
        return _REFUSED
    save_file(tensors_of(tree), target, {"format": "pt"})
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
