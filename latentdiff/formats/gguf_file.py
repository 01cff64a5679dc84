"""GGUF files: the weights of one network, most of them in blocks of small integers with a scale each.

Tensors keep their type: floats of 16 bits or more and integers are numbers, all other types are rows of blocks. Only
the names, types and shapes of tensors are taken from a file; its other entries say nothing that the names do not.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from latentdiff.core.errors import ModelError, loading

if TYPE_CHECKING:
    from torch import Tensor

MAGIC = b"GGUF"
MOST_TENSORS, MOST_ENTRIES, MOST_ELEMENTS = 100_000, 10_000, 1_000_000  # of networks; vocabularies have 300,000 words
_TEXT, _ARRAY = 8, 9  # kinds of values
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # kind -> bytes
_SHAPE = "comfy.gguf.orig_shape."  # before the name of a tensor that was given another shape to fill blocks


def is_gguf(file: Path) -> bool:
    """Whether a file begins as a GGUF file."""
    with file.open("rb") as handle:
        return handle.read(4) == MAGIC


def shapes_in(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the numbers in a file by name, from its header. Raises ModelError."""
    with loading(file):
        reader = _reader(file)
        return {tensor.name: _shape(reader, tensor) for tensor in reader.tensors}


def types_in(file: Path) -> list[str]:
    """The names of the types in a file: F32, Q4_0, ... Raises ModelError."""
    with loading(file):
        return sorted({tensor.tensor_type.name for tensor in _reader(file).tensors})


def numbers_in(file: Path) -> int:
    """The number of values in a file, from its header. Raises ModelError."""
    return sum(map(math.prod, shapes_in(file).values()))


def read_gguf(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, those in blocks as diffusers' GGUFParameter. Raises ModelError."""
    import torch
    from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES, GGUFParameter
    from gguf import GGMLQuantizationType as Type

    state: dict[str, Tensor] = {}
    with loading(file):
        reader = _reader(file)
        for tensor in reader.tensors:
            values, kind = torch.from_numpy(tensor.data.copy()), tensor.tensor_type
            if kind is Type.BF16:
                state[tensor.name] = values.view(torch.bfloat16).reshape(_shape(reader, tensor))
            elif kind in (Type.F64, Type.F32, Type.F16, Type.I64, Type.I32):
                state[tensor.name] = values.reshape(_shape(reader, tensor))
            elif kind not in SUPPORTED_GGUF_QUANT_TYPES:
                raise ModelError(f"{tensor.name} has the type {kind.name}, which is not supported ({file})")
            elif _SHAPE + tensor.name in reader.fields:
                raise ModelError(f"{tensor.name} has blocks that cross its rows, which is not supported ({file})")
            else:
                state[tensor.name] = GGUFParameter(values, quant_type=kind)
    return state


def _reader(file: Path) -> Any:
    from gguf import GGUFReader

    if not is_gguf(file):
        raise ModelError(f"{file} is not a GGUF file")
    with file.open("rb") as content:
        _check_header(content, file)
    return GGUFReader(file)


def _check_header(content: BinaryIO, file: Path) -> None:
    """Raises ModelError for entries that claim more than the file has: the library would read them for ever."""
    size = file.stat().st_size
    content.seek(len(MAGIC))
    version, tensors, entries = struct.unpack("<IQQ", content.read(20))
    if version not in (2, 3):
        raise ModelError(f"{file} is a GGUF file of version {version}; 2 and 3 are read")
    if not 0 < tensors <= MOST_TENSORS or entries > MOST_ENTRIES:
        raise ModelError(
            f"{file} claims {tensors:,} tensors and {entries:,} entries;"
            f" 1 to {MOST_TENSORS:,} and at most {MOST_ENTRIES:,} are allowed"
        )
    for _ in range(entries):
        _skip(content, _number(content, "<Q"), size)  # its name
        kind, count = _number(content, "<I"), 1
        if kind == _ARRAY:
            kind, count = struct.unpack("<IQ", content.read(12))
        if count > MOST_ELEMENTS or kind not in (_TEXT, *_WIDTHS):
            raise ModelError(f"{file} has an entry of {count:,} values of kind {kind}, which is absurd")
        for _ in range(count if kind == _TEXT else 1):
            _skip(content, _number(content, "<Q") if kind == _TEXT else count * _WIDTHS[kind], size)


def _number(content: BinaryIO, form: str) -> int:
    return int(struct.unpack(form, content.read(struct.calcsize(form)))[0])


def _skip(content: BinaryIO, length: int, size: int) -> None:
    if content.tell() + length > size:
        raise ModelError("the file is cut off")
    content.seek(length, 1)


def _shape(reader: Any, tensor: Any) -> tuple[int, ...]:
    """A tensor's shape in torch's order; GGUF lists the last dimension first."""
    field = reader.fields.get(_SHAPE + tensor.name)
    if field is not None:
        return tuple(int(field.parts[part][0]) for part in field.data)
    return tuple(int(length) for length in reversed(tensor.shape))
