"""A model folder on disk, before anything is built: what is refused, what it holds, its hash.

A folder is diffusers' layout: model_index.json and a sub-folder with config.json and safetensors weights for each
network. Nothing but JSON, safetensors and the tokenizer's text is ever read from it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from latentdiff.errors import ModelError, ResourceError, UnsafeError, raised_as

KNOWN_CLASSES = {
    "vae": {"AutoencoderKL"},
    "unet": {"UNet2DConditionModel"},
    "text_encoder": {"CLIPTextModel"},
    "tokenizer": {"CLIPTokenizer", "CLIPTokenizerFast"},
}
LARGEST_NUMBER = 200_000  # of any size in a config; Stable Diffusion's largest is its vocabulary, 49,408
LARGEST_DEPTH = 1000  # of any number of layers; each is an object, even where it takes no memory for weights
_ASKS_TO_RUN_CODE = ("auto_map", "custom_pipelines", "_attn_implementation_internal", "trust_remote_code")
_ARCHIVE, _PICKLES = b"PK\x03\x04", (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def check_folder(directory: Path) -> dict[str, Any]:
    """Refuse a folder that is not a model or asks to run code; returns its model_index. Builds nothing."""
    if not directory.is_dir():
        raise ModelError(f"no such model folder ({directory}). Give a folder with a model_index.json")
    if not (directory / "model_index.json").is_file():
        raise ModelError(f"no model_index.json ({directory}). Give a folder in diffusers' layout")
    for file in _files(directory):
        if file.suffix == ".py":
            raise UnsafeError(
                f"model directory asks to run code ({file.relative_to(directory)}). latentdiff never does this"
            )
        if file.suffix == ".json":
            _check_json(file, directory)
        elif _is_pickle(file):
            raise UnsafeError(
                f"{file.relative_to(directory)} is a pickle file ({directory}). latentdiff loads safetensors only"
            )
    index = read_json(directory / "model_index.json")
    _check_parts(index, directory)
    return index


def read_json(path: Path) -> dict[str, Any]:
    """The object a JSON file holds. Raises ModelError."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(f"{path.parent.name}/{path.name} is not valid JSON ({path}): {error}") from None
    if not isinstance(tree, dict):
        raise ModelError(f"{path.parent.name}/{path.name} is not a JSON object ({path})")
    return tree


def _files(directory: Path) -> Iterator[Path]:
    """Every file of the folder, in order; linked files are read (hub caches are made of them), linked folders not."""
    for parent, folders, names in os.walk(directory):
        for name in sorted(folders + names):
            path = Path(parent) / name
            if path.is_symlink() and path.is_dir():
                raise UnsafeError(f"{path.relative_to(directory)} is a link to a folder ({directory}). Copy it there")
            if not path.is_dir() and not path.is_file():
                raise ModelError(f"{path.relative_to(directory)} is not a file ({directory})")
            if path.is_file():
                yield path


def _check_parts(index: dict[str, Any], directory: Path) -> None:
    for part, known in KNOWN_CLASSES.items():
        entry = index.get(part)
        if part == "vae" and entry in (None, [None, None]):
            continue  # a pixel-space model
        name = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if not (isinstance(name, str) and name in known):
            raise UnsafeError(
                f"{part} is of unknown class {name} ({directory}/model_index.json). Known: {', '.join(sorted(known))}"
            )
        needed = ("tokenizer.json", "vocab.json") if part == "tokenizer" else ("config.json",)
        if not any((directory / part / file).is_file() for file in needed):
            raise ModelError(f"{part}/{' or '.join(needed)} is missing ({directory})")
        if part != "tokenizer" and not any((directory / part).glob("*.safetensors")):
            raise ModelError(f"{part} has no safetensors weights ({directory})")


def _check_json(file: Path, directory: Path) -> None:
    name, tree = str(file.relative_to(directory)), read_json(file)
    if file.parent.name == "tokenizer":
        return  # vocabularies: words and numbers that build nothing
    for key, value in _entries(tree):
        if key in _ASKS_TO_RUN_CODE:
            raise UnsafeError(f"model directory asks to run code ({key} in {name}). latentdiff never does this")
        if key == "weight_map":
            shards = value.values() if isinstance(value, dict) else [value]
            if any(not isinstance(v, str) or "/" in v or "\\" in v for v in shards):
                raise UnsafeError(f"{name} names shards outside its folder ({directory})")
        largest = LARGEST_DEPTH if "layers" in key else LARGEST_NUMBER
        if isinstance(value, int | float) and not abs(value) <= largest and key != "total_size":
            raise ModelError(f"{name}: {key} = {value} is absurd ({directory}). The largest allowed is {largest}")


def _entries(tree: Any) -> Iterable[tuple[str, Any]]:
    """Every (key, value) of nested JSON; items of a list come under the list's own key."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield key, value
            yield from _entries(value)
            if isinstance(value, list):
                yield from ((key, item) for item in value)
    elif isinstance(tree, list):
        for item in tree:
            yield from _entries(item)


def _is_pickle(file: Path) -> bool:
    """By name, and by content: pickle protocols 2 and up open with 0x80, torch's archives are zip files.

    A safetensors file opens with the 8-byte length of a JSON header, then "{"; one too short to say is left to its
    loader.
    """
    with file.open("rb") as handle:
        head = handle.read(9)
    if file.suffix.lower() == ".safetensors":
        return len(head) == 9 and head[8:9] != b"{"
    named = file.suffix.lower() in (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
    return named or head[:2] in _PICKLES or head[:4] == _ARCHIVE


def loading(part: str, directory: Path) -> AbstractContextManager[None]:
    """Whatever a library raises while it reads a part becomes a ModelError of one line."""
    return raised_as(ModelError, f"cannot load {part} ({directory})")


def saving(part: str, directory: Path) -> AbstractContextManager[None]:
    """Whatever a library raises while it writes a part, of a full disk above all, becomes a line of ResourceError."""
    return raised_as(ResourceError, f"cannot write {part} ({directory})")


def let_others_read(directory: Path) -> None:
    """Give the weights of a folder the mode that the umask asks for: safetensors makes them their owner's alone."""
    mask = os.umask(0)
    os.umask(mask)
    for file in directory.rglob("*.safetensors"):
        file.chmod(0o666 & ~mask)


def folder_hash(directory: Path) -> str:
    """sha256 of the weights that draw, in the order of their names: which model drew a picture."""
    digest = hashlib.sha256()
    for part in ("text_encoder", "unet", "vae"):
        for file in sorted((directory / part).glob("*.safetensors")):
            digest.update(file.relative_to(directory).as_posix().encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def parameter_counts(directory: Path) -> dict[str, int]:
    """Number of parameters of each part, from the headers of its weights."""
    from safetensors import safe_open

    counts: dict[str, int] = {}
    for file in sorted(directory.glob("*/*.safetensors")):
        part = file.parent.name
        with loading(part, directory), safe_open(file, "np") as weights:
            names = weights.keys()  # not a mapping: it cannot be iterated
            sizes = (math.prod(weights.get_slice(name).get_shape()) for name in names)
            counts[part] = counts.get(part, 0) + sum(sizes)
    return counts


def picture_geometry(directory: Path) -> tuple[int, tuple[int, int]]:
    """What sides in pixels must be multiples of, and the model's own (height, width), from its configs alone."""
    with loading("the configs", directory):
        unet = read_json(directory / "unet" / "config.json")
        vae = directory / "vae" / "config.json"
        factor = 2 ** (len(read_json(vae)["block_out_channels"]) - 1) if vae.is_file() else 1
        sample = unet["sample_size"]
        if type(sample) is not int or sample < 1:
            raise ModelError(f"unet/config.json: sample_size must be a whole number of latents (got {sample!r})")
        side = sample * factor
        return factor * 2 ** (len(unet["block_out_channels"]) - 1), (side, side)
