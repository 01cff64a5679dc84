"""A model's networks as OpenVINO graphs on disk: `MODEL/openvino/`, beside the weights that they read.

    unet.xml.gz, text_encoder.xml.gz, ...   the graphs, with named inputs; their weights are inputs too, named as in
                                            the model's own files
    constants.safetensors                   all other constants, which depend only on the configuration
    export.json                             facts about the networks, and the configurations of the export

So an export takes a third of a megabyte whatever the size of the model, has no second copy of the weights, and stays
valid when they are trained further. A changed configuration is refused.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latentdiff.core.errors import ModelError, loading
from latentdiff.formats.folder import read_json, weight_files

FOLDER, RECORD, CONSTANTS = "openvino", "export.json", "constants.safetensors"
FORMAT = 6
_LARGEST = 1 << 28  # bytes of a graph; those of the largest models have ten million
_SEAL = "sha256"
WEIGHT = "weight:"  # prefix of the names of inputs that are weights
_UNREAD = ("architectures", "dtype", "torch_dtype", "transformers_version")  # keys of configs that do not matter
_OLD_NAMES = (  # today's names of weights -> those in older files, or of the same weight there
    ("", "text_model."),
    ("", "model."),
    ("language_model.", ""),
    ("encoder.embed_tokens.", "shared."),
    ("shared.", "encoder.embed_tokens."),
    ("to_q.", "query."),
    ("to_k.", "key."),
    ("to_v.", "value."),
    ("to_out.0.", "proj_attn."),
)
_STORED = {"F64": "f64", "F32": "f32", "F16": "f16", "BF16": "u16"}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: safetensors' name of its type, its shape, its first byte and the byte after its last."""

    file: Path
    kind: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def read(self) -> np.ndarray:
        """The numbers, memory-mapped from the file; bfloat16 as its bits in uint16."""
        values = np.memmap(self.file, np.uint8, "r", self.begin, (self.end - self.begin,))
        kind = np.uint16 if self.kind == "BF16" else np.dtype(_STORED[self.kind].replace("f", "float"))
        return np.asarray(values.view(kind).reshape(self.shape))


@dataclass(frozen=True, eq=False)
class Changed:
    """A tensor in place of a stored one, float32. file: what changed it."""

    values: np.ndarray
    file: Path
    kind: str = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        return self.values.shape

    def read(self) -> np.ndarray:
        """The numbers."""
        return self.values


@dataclass(frozen=True)
class Exported:
    """An export that fits its model; `folder` holds the graphs."""

    directory: Path
    variant: str | None
    folder: Path
    record: dict[str, Any]

    def graph(self, part: str) -> tuple[bytes, np.ndarray]:
        """The graph of a part and its constants, as bytes for OpenVINO. Raises ModelError."""
        from safetensors.numpy import load_file

        file = self.folder / file_of(part)
        with loading(f"{FOLDER}/{file.name}", self.directory), gzip.open(file) as content:
            graph = content.read(_LARGEST + 1)
            if len(graph) > _LARGEST:
                raise ModelError(f"a graph of more than {_LARGEST >> 20} MB ({file})")
            return graph, load_file(self.folder / CONSTANTS)[part]

    def part(self, graph: str) -> str:
        """The part of the model that has a graph's weights."""
        return str(self.record["graphs"][graph])

    def weights(self, part: str) -> dict[str, Stored]:
        """The stored tensors of a graph's network by name. Raises ModelError."""
        files = weight_files(self.directory / self.part(part), self.variant)
        return {name: stored for file in files for name, stored in _tensors(file)}

    def tokenizer(self, part: str) -> Path:
        """The tokenizer's file of a text encoder: the model's, or one beside the graphs."""
        own = self.record["texts"][part]["tokenizer"] == "model"
        return (self.directory if own else self.folder) / tokenizer_of(part) / "tokenizer.json"

    def identity(self, part: str) -> str:
        """A hash of the graph with its constants. Raises ModelError."""
        digest = hashlib.sha256()
        with loading(f"{FOLDER}/{file_of(part)}", self.directory):
            for name in (file_of(part), CONSTANTS):
                digest.update((self.folder / name).read_bytes())
        return digest.hexdigest()


def exported(directory: Path, variant: str | None = None, folder: Path | None = None) -> Exported | None:
    """The export of a checked folder of a model or of a ControlNet, or None. Raises ModelError if it does not fit.

    folder: where the graphs are, if not in their usual place yet.
    """
    folder = folder or directory / FOLDER
    path, again = folder / RECORD, f"Export it again: latentdiff convert {directory} --to openvino"
    if not folder.is_dir():
        return None
    lacking = [name for name in (RECORD, CONSTANTS) if not (folder / name).is_file()]
    if lacking:
        raise ModelError(f"an export without {lacking[0]} ({folder}). {again}")
    record = read_json(path)
    if record.get("format") != FORMAT:
        raise ModelError(f"an export of format {record.get('format')!r}, not {FORMAT} ({path}). {again}")
    if record != sealed(record):
        raise ModelError(f"an export whose facts were changed ({path}). {again}")
    changed = [part for part, known in record["configs"].items() if known != config_hash(directory / part)]
    if changed:
        raise ModelError(f"exported before {changed[0]}/config.json was changed ({path}). {again}")
    if lacking := [file for file in map(file_of, record["graphs"]) if not (folder / file).is_file()]:
        raise ModelError(f"an export without {lacking[0]} ({folder}). {again}")
    return Exported(directory, variant, folder, record)


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """The content of export.json with a hash of itself: what runs the graphs relies on every fact."""
    content = {key: value for key, value in record.items() if key != _SEAL}
    return content | {_SEAL: hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


def file_of(graph: str) -> str:
    """The name of a graph's file."""
    return f"{graph}.xml.gz"


def tokenizer_of(part: str) -> str:
    """The folder of a text encoder's tokenizer."""
    return part.replace("text_encoder", "tokenizer")


def config_hash(part: Path) -> str:
    """The hash of the part of a network's configuration that its graph depends on."""
    tree = read_json(part / "config.json")
    read = {key: value for key, value in tree.items() if not key.startswith("_") and key not in _UNREAD}
    return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()


def named(weights: Mapping[str, Stored | Changed], name: str, part: str, directory: Path) -> Stored | Changed:
    """The tensor of that name, or of its name in older files. Raises ModelError."""
    for new, old in _OLD_NAMES:
        for candidate in (name, name.replace(new, old, 1) if new else old + name):
            if candidate in weights:
                return weights[candidate]
    raise ModelError(f"{name} is not among the weights of {part} ({directory})")


def _tensors(file: Path) -> Iterator[tuple[str, Stored]]:
    """The tensors of a safetensors file. The library checks the header and that every tensor lies in the file."""
    from safetensors import safe_open

    with loading(file.parent.name, file.parent.parent), safe_open(file, "np"), file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        header = json.loads(content.read(length))
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] in _STORED:
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            yield name, Stored(file, entry["dtype"], tuple(entry["shape"]), begin, end)
