"""Which files are pickles, by content: they are refused wherever weights are expected, whatever their name is."""

from __future__ import annotations

from pathlib import Path

from latentdiff.core.decoding import LFS_POINTER
from latentdiff.core.errors import ModelError, UnsafeError

_ARCHIVE, _PICKLES = b"PK\x03\x04", (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
SHORTEST = 8  # bytes before the header of a safetensors file; of a file that ends there the loader says what is wrong


def is_pickle(file: Path) -> bool:
    """Whether name or content is a pickle's: pickle protocols from 2 begin with 0x80, torch's archives are zip files.

    A safetensors file begins with the 8-byte length of a JSON header, then "{". A file shorter than that is no pickle
    here: its loader refuses it.
    """
    with file.open("rb") as handle:
        head = handle.read(9)
    if named_safetensors(file) and (len(head) < 9 or head[8:9] == b"{"):
        return False
    named = file.suffix.lower() in (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
    return named or head[:2] in _PICKLES or head[:4] == _ARCHIVE


def check_safetensors(file: Path, advice: str = "") -> None:
    """Refuse what does not begin as a safetensors file. Raises UnsafeError for a pickle, ModelError for others.

    The most frequent other is the pointer that a clone without Git LFS has in place of the file.
    """
    if is_pickle(file):
        raise UnsafeError(f"{file} is a pickle file; latentdiff loads safetensors only{advice}")
    with file.open("rb") as handle:
        head = handle.read(len(LFS_POINTER))
    if head == LFS_POINTER:
        raise ModelError(f"{file} is only a pointer of Git LFS. git lfs pull fetches the file")
    if head[8:9] != b"{":
        raise ModelError(f"{file} is not a safetensors file")


def named_safetensors(file: Path) -> bool:
    """Whether the suffix is .safetensors, in upper or lower case."""
    return file.suffix.lower() == ".safetensors"
