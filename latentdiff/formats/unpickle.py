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
LONGEST = 3600  # seconds
_PARTS_OF_NUMPY = {"scalar", "_reconstruct", "dtype", "ndarray"}  # the objects that it pickles are made of these
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
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=LONGEST, check=False)
    except subprocess.TimeoutExpired:
        raise ModelError(f"cannot read the pickle {source}: it took over {LONGEST} seconds") from None
    lines = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
    if done.returncode == _REFUSED:
        raise UnsafeError(f"{source} holds more than tensors ({lines[0]}). latentdiff never loads such files")
    if done.returncode:
        raise ModelError(f"cannot read the pickle {source}: {lines[0][:200]}")
    return done.stdout.split()


def tensors_of(tree: Any) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name."""
    outer: list[Any] = []
    while isinstance(tree, dict) and (nest := next((n for n in _NESTS if isinstance(tree.get(n), dict)), None)):
        if any(tree is each for each in outer):
            raise ValueError("a dictionary in it contains itself")
        outer.append(tree)
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
            if not isinstance(name, str | int) or name == "__metadata__":
                raise ValueError("a tensor in it has a name that no safetensors file can hold")
            yield from _named(value, f"{prefix}{name}.")


def _foreign(source: str) -> list[str]:
    """The names in a checkpoint that weights_only would refuse, if all of them belong to known libraries."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(source)
    except Exception:
        return []
    return sorted(names) if all(map(_is_dropped, names)) else []


def _is_dropped(name: str) -> bool:
    """Whether an object is dropped: a class of a known library, by the way its name is written, or NumPy's numbers.

    A function may do anything; a file that names one is refused.
    """
    library, last = name.partition(".")[0], name.rpartition(".")[2]
    return library in _LIBRARIES and (last[:1].isupper() or (library == "numpy" and last in _PARTS_OF_NUMPY))


def _calls(source: Path) -> tuple[str, str] | None:
    """The first name that a pickle of another protocol would import, in an archive or bare; it is not run."""
    import pickletools
    import zipfile

    try:
        if zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as archive:
                content = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
        else:
            content = source.read_bytes()
        named = [opcode.name for opcode, _, _ in pickletools.genops(content)]
    except (ValueError, StopIteration, OSError, zipfile.BadZipFile):  # not a pickle
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
        print(foreign[1] if foreign else "it is not a complete pickle of protocol 2", file=sys.stderr)
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
