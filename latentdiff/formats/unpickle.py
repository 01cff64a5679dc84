"""A pickle's tensors as safetensors, read in a process of its own: `python -m latentdiff.formats.unpickle FROM TO`.

torch reads the pickle with weights_only, which builds only tensors and plain containers. Objects of the libraries that
write checkpoints (a Lightning callback, say) are replaced by empty ones and their names printed; for any other object
the file is refused. The process writes one new file and ends.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from latentdiff.core.errors import ModelError, UnsafeError

_NESTS = ("state_dict", "model", "string_to_param")  # where checkpoints keep their tensors
_REFUSED = 7
_LIBRARIES = {  # whose objects lie beside the tensors of checkpoints; none of them is imported
    "argparse",
    "diffusers",
    "ldm",
    "lightning",
    "lightning_fabric",
    "lightning_utilities",
    "modelcards",
    "numpy",
    "omegaconf",
    "pathlib",
    "pytorch_lightning",
    "sgm",
    "torchmetrics",
    "transformers",
    "typing",
}


class _Empty:
    """In place of an object that is dropped: nothing of it is built or called."""

    def __new__(cls, *_: Any, **__: Any) -> _Empty:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def unpickled(source: Path, target: Path) -> list[str]:
    """Write a pickle's tensors to a new safetensors file. Returns the names of the objects that were dropped.

    Raises UnsafeError for a pickle that would run code.
    """
    # -P: otherwise a file in the working directory could be imported in place of a module
    words = [sys.executable, "-P", "-m", "latentdiff.formats.unpickle", str(source.absolute()), str(target.absolute())]
    done = subprocess.run(words, capture_output=True, text=True, timeout=3600, check=False)
    lines = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
    if done.returncode == _REFUSED:
        raise UnsafeError(f"{source} holds more than tensors ({lines[0]}). latentdiff never loads such files")
    if done.returncode:
        raise ModelError(f"cannot read the pickle {source}: {lines[0][:200]}")
    return done.stdout.split()


def tensors_of(tree: Any) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name."""
    while isinstance(tree, dict) and (nest := next((n for n in _NESTS if isinstance(tree.get(n), dict)), None)):
        one = nest == "string_to_param" and len(tree[nest]) == 1
        tree = {"emb_params": next(iter(tree[nest].values()))} if one else tree[nest]
    named = list(_named(tree, ""))
    if not named:
        raise ValueError("it holds no tensors")
    if len(dict(named)) < len(named):
        raise ValueError("two of its tensors have the same name")
    return dict(named)


def _named(tree: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield prefix.removesuffix("."), tree.detach().clone().contiguous()  # tensors that share memory become separate
    elif isinstance(tree, dict | list | tuple):
        for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _named(value, f"{prefix}{name}.")


def _foreign(source: str) -> list[str]:
    """The names in a checkpoint that weights_only would refuse, if all of them are of known libraries."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(source)
    except Exception:
        return []
    return sorted(names) if all(name.partition(".")[0] in _LIBRARIES for name in names) else []


def _calls(source: Path) -> tuple[str, str] | None:
    """The first name that a bare pickle of another protocol would import; it is not run."""
    import pickletools

    try:
        named = [opcode.name for opcode, _, _ in pickletools.genops(source.read_bytes())]
    except ValueError:  # not a pickle
        return None
    return next(
        (("", f"opcode {name}") for name in named if name in ("GLOBAL", "STACK_GLOBAL", "INST", "REDUCE")), None
    )


def main(source: str, target: str) -> int:
    """The child process; returns its exit code."""
    import pickle

    foreign_names = _foreign(source)
    try:
        with torch.serialization.safe_globals([(_Empty, name) for name in foreign_names]):
            tree = torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error)) or _calls(Path(source))
        print(foreign[1] if foreign else "it is not a complete pickle", file=sys.stderr)
        return _REFUSED if foreign else 1
    try:
        save_file(tensors_of(tree), target, {"format": "pt"})
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print(*foreign_names)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
