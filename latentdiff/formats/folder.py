"""A model folder on disk, before any network is built: what is refused, what the folder holds, its hash.

It has diffusers' layout: model_index.json and, for each network, a sub-folder with config.json and safetensors weights.
A network whose weights are in blocks has a GGUF file instead. Only JSON, safetensors, GGUF and the tokenizer's text are
read from it.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from latentdiff.core.errors import ModelError, UnsafeError, loading
from latentdiff.core.files import sha256_of
from latentdiff.formats import gguf_file
from latentdiff.formats.pickle import SHORTEST, check_safetensors, is_pickle, named_safetensors

_UNREAD = {
    "scheduler",
    "low_res_scheduler",
    "safety_checker",
    "feature_extractor",
    "image_encoder",
}
_MODULES = {"diffusers", "transformers", "stable_diffusion", None}
NETWORKS = ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "unet", "vae")
_NO_SIZE = 128  # latents of a side of a transformer whose config has no size
_TOKEN = 2  # latents of a side of its tokens
LARGEST_NUMBER = 300_000  # of any size in a config; Qwen3's largest is its number of positions, 262,144
LONGEST_LIST = 64  # entries of a list with one value for each level
LARGEST_DEPTH = 1000  # of any number of layers; each is an object, even where it takes no memory for weights
LARGEST_PERIOD = 1e9  # of rotary embeddings
_TOTALS = ("total_size", "total_parameters")  # of an index of shards; nothing is built from them
_ASKS_TO_RUN_CODE = {
    "auto_map",
    "custom_pipelines",
    "trust_remote_code",
    "attn_implementation",  # may name a kernel of the hub
    "_attn_implementation",
    "_attn_implementation_internal",
    "quantization_config",  # calls the loader of another package
}
FEW_STEPS = "few_steps"  # the folder of a model's student of few steps, an adapter
FEW_STEPS_FILE = "pytorch_lora_weights.safetensors"
GGUF = "model.gguf"  # the weights of a network, if some are in blocks
_SINGLE = re.compile(r"(?:diffusion_pytorch_model|model)(?:\.((?:(?!-\d{5}-of-)[\w.-])+))?\.safetensors")
_INDEX = re.compile(r"(?:diffusion_pytorch_model|model)\.safetensors\.index(?:\.([\w.-]+))?\.json")


def read_index(directory: Path) -> dict[str, Any]:
    """The model_index of a folder. Raises UnsafeError if the folder would run code, ModelError for absurd values.

    A pickle in place of weights is refused; a pickle beside safetensors, which many models have, is never opened.
    """
    if not directory.is_dir():
        kind = "file" if named_safetensors(directory) else "model folder"
        raise ModelError(f"no such {kind} ({directory}). Give a folder with a model_index.json, or a .safetensors")
    if not (directory / "model_index.json").is_file():
        raise ModelError(f"no model_index.json ({directory}). {_advice(directory)}")
    _check_contents(directory)
    return read_json(directory / "model_index.json")


def _advice(directory: Path) -> str:
    """What to do about a folder that is no model."""
    if (directory / "model" / "model_index.json").is_file():
        return f"Its model is {directory / 'model'}"
    if any(directory.glob("*lora_weights.safetensors")):
        return "It holds an adapter: use --lora"
    if any(directory.glob("learned_embeds.safetensors")):
        return "It holds a learnt word: use --embedding"
    return "Give a folder in diffusers' layout"


def check_network(path: Path, part: str, classes: Set[str]) -> Path:
    """The folder of one network: `path`, or this part of the model folder `path`; refusals as in `read_index`.

    Raises ModelError, UnsafeError.
    """
    folder = (path / part if (path / "model_index.json").is_file() else path).resolve()
    what = part.replace("_", " ") if "_" in part else part.upper()
    if not (folder / "config.json").is_file():
        raise ModelError(f"no {what} ({path}). Give a folder with its config.json and safetensors weights")
    _check_contents(folder, of_model=False)
    config = read_json(folder / "config.json")
    architectures = config.get("architectures")  # of transformers
    name = config.get("_class_name", architectures[0] if isinstance(architectures, list) and architectures else None)
    if not isinstance(name, str) or name not in classes:
        raise UnsafeError(f"a {what} of unknown class {str(name)[:60]} ({path}). Known: {', '.join(sorted(classes))}")
    return folder


def _check_contents(directory: Path, *, of_model: bool = True) -> None:
    """Refuse code, pickles in place of weights, and absurd values. of_model: the top folder of a model has no weights.

    Raises ModelError, UnsafeError.
    """
    for file in _files(directory):
        if file.suffix == ".py":
            raise UnsafeError(
                f"model directory asks to run code ({file.relative_to(directory)}). latentdiff never does this"
            )
        if file.suffix == ".json":
            check_json(file, directory)
        elif is_pickle(file) and (named_safetensors(file) or not _unread(file.parent, directory, of_model)):
            raise UnsafeError(
                f"{file.relative_to(directory)} is a pickle file ({directory}). latentdiff loads safetensors only"
            )
        elif named_safetensors(file) and file.stat().st_size > SHORTEST:
            check_safetensors(file)


def _unread(folder: Path, directory: Path, of_model: bool) -> bool:
    """Whether a pickle in this folder would never be opened."""
    return (of_model and folder == directory) or any(folder.glob("*.safetensors"))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ModelError."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(f"{path.parent.name}/{path.name} is not valid JSON ({path}): {error}") from None
    if not isinstance(tree, dict):
        raise ModelError(f"{path.parent.name}/{path.name} is not a JSON object ({path})")
    return tree


def _files(directory: Path) -> Iterator[Path]:
    """Every file of the folder, in order. Links to files are followed, since hub caches use them; links to folders are
    refused.
    """
    for parent, folders, names in os.walk(directory):
        for name in sorted(folders + names):
            path = Path(parent) / name
            if path.is_symlink() and path.is_dir():
                raise UnsafeError(f"{path.relative_to(directory)} is a link to a folder ({directory}). Copy it there")
            if not path.is_dir() and not path.is_file():
                raise ModelError(f"{path.relative_to(directory)} is not a file ({directory})")
            if path.is_file():
                yield path


def check_index(
    index: dict[str, Any],
    directory: Path,
    parts: Mapping[str, Set[str]],
    optional: Set[str],
    elsewhere: Set[str] = frozenset(),
) -> None:
    """Refuse a model_index whose parts and their classes are not those that the family lists.

    elsewhere: parts whose weights are not read from the folder.
    Raises ModelError, UnsafeError.
    """
    where = f"{directory}/model_index.json"
    for part in sorted(parts.keys() | {key for key, entry in index.items() if isinstance(entry, list)}):
        entry = index.get(part)
        if part in optional | _UNREAD and entry in (None, [None, None]):
            continue
        module, name = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        module = module if isinstance(module, str | None) else str(module)
        if part == "_class_name" or (part in _UNREAD and module in _MODULES):
            continue
        if part in _UNREAD:
            raise UnsafeError(f"{part} has the unknown module {module} ({where}). latentdiff never imports one")
        if part not in parts:
            if entry == [None, None]:
                continue
            raise ModelError(f"models with {part} are not supported ({where})")
        if not (isinstance(name, str) and name in parts[part] and module in _MODULES):
            known = ", ".join(sorted(parts[part]))
            raise UnsafeError(f"{part} has the unknown class {name} ({where}). Known: {known}")
        if part not in elsewhere:
            _check_files(part, directory)


def _check_files(part: str, directory: Path) -> None:
    tokens = part.startswith("tokenizer")
    needed = ("tokenizer.json", "vocab.json") if tokens else ("config.json",)
    if not any((directory / part / file).is_file() for file in needed):
        raise ModelError(f"{part}/{' or '.join(needed)} is missing ({directory})")
    if not tokens and not any((directory / part).glob("*.safetensors")) and not (directory / part / GGUF).is_file():
        raise ModelError(f"{part} has no safetensors weights ({directory})")


def check_json(file: Path, directory: Path) -> None:
    """Refuse a JSON file of a model that would run code or has absurd sizes. Raises ModelError, UnsafeError."""
    if file.parent.name.startswith("tokenizer"):
        return  # vocabularies are megabytes of words and numbers, which build no network
    name, tree = str(file.relative_to(directory)), read_json(file)
    for key, value in _entries(tree):
        if key in _ASKS_TO_RUN_CODE:
            raise UnsafeError(f"model directory asks to run code ({key} in {name}). latentdiff never does this")
        if key == "weight_map":
            shards = value.values() if isinstance(value, dict) else [value]
            if any(not isinstance(v, str) or "/" in v or "\\" in v for v in shards):
                raise UnsafeError(f"{name} names shards outside its folder ({directory})")
        if file.name == "config.json" and isinstance(value, list) and len(value) > LONGEST_LIST:
            raise ModelError(f"{name}: {key} has {len(value):,} entries, at most {LONGEST_LIST} allowed ({directory})")
        largest = LARGEST_DEPTH if "layers" in key else LARGEST_PERIOD if key == "rope_theta" else LARGEST_NUMBER
        if isinstance(value, int | float) and not abs(value) <= largest and key not in _TOTALS:
            raise ModelError(f"{name}: {key} = {value} is absurd ({directory}). The largest allowed is {largest}")


def _entries(tree: Any) -> Iterable[tuple[str, Any]]:
    """Every (key, value) of nested JSON; items of a list have the list's key."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield key, value
            yield from _entries(value)
            yield from ((key, item) for item in _items(value))
    elif isinstance(tree, list):
        for item in tree:
            yield from _entries(item)


def _items(value: Any) -> Iterable[Any]:
    """The items of a list and of lists inside it."""
    for item in value if isinstance(value, list) else []:
        yield item
        yield from _items(item)


def check_depth(config: dict[str, Any], tensors: int, part: str, directory: Path) -> None:
    """Refuse a config with more layers than the weights have tensors, before any is built. Raises ModelError."""
    depth = 1
    for key, value in config.items():
        numbers = [number for number in [value, *_items(value)] if isinstance(number, int | float)]
        if "layers" in key and key != "max_window_layers" and numbers:  # that one is a place among them
            if any(type(number) is not int or number < 0 for number in numbers):
                raise ModelError(f"{part}/config.json: {key} must be a number of layers ({directory})")
            depth *= int(max(numbers))
    if depth > tensors:
        raise ModelError(f"{part}/config.json describes {depth:,} layers for {tensors:,} weights ({directory})")


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The files of a network's weights: one file, or the shards that an index names. The folder has been checked.

    variant: which of several sets of weights, fp16, non_ema, ...; by default the set without a variant, or the only
    one. Raises ModelError.
    """
    variants, variant = _variants(folder), variant_of(folder, variant)
    if variant not in variants:
        known = ", ".join(sorted(name or "the plain one" for name in variants)) or "none"
        what = "several variants: name one" if variant is None and variants else f"no weights of variant {variant}"
        raise ModelError(f"{folder.name} has {what} ({folder.parent}). There are: {known}")
    if not variants[variant].name.endswith(".json"):
        return [variants[variant]]
    shards = read_json(variants[variant]).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ModelError(f"{folder.name}/{variants[variant].name} maps no weights ({folder.parent})")
    files = [folder / str(name) for name in sorted(set(shards.values()))]
    for file in files:
        if not file.is_file():
            raise ModelError(f"{folder.name}/{file.name} is missing ({folder.parent})")
    return files


def variant_of(folder: Path, variant: str | None) -> str | None:
    """The variant that `weight_files` chooses, by the name that libraries take."""
    variants = _variants(folder)
    return next(iter(variants)) if variant is None and None not in variants and len(variants) == 1 else variant


def _variants(folder: Path) -> dict[str | None, Path]:
    """The single file or the index of each variant of a network's weights. Raises ModelError."""
    if not folder.is_dir():
        raise ModelError(f"{folder.name} is missing ({folder.parent})")
    variants: dict[str | None, Path] = {None: folder / GGUF} if (folder / GGUF).is_file() else {}
    if variants and any(folder.glob("*.safetensors")):
        raise ModelError(f"{folder.name} has both {GGUF} and safetensors weights ({folder.parent}). Remove one")
    for file in sorted(folder.iterdir()):
        single, index = _SINGLE.fullmatch(file.name), _INDEX.fullmatch(file.name)
        if named := index or single:
            variants.setdefault(named[1], file)
    return variants


def folder_hash(directory: Path, variant: str | None = None) -> str:
    """sha256 of the weights of all parts, in the order of their names: it identifies a model in pictures' records."""
    folders = [directory / part for part in NETWORKS if (directory / part).is_dir()]
    with loading("the weights", directory):
        return sha256_of(*(file for part in folders for file in weight_files(part, variant)), named_in=directory)


def settings_hash(directory: Path) -> str:
    """sha256 of the files beside the weights: configs, tokenizer, schedule. Raises ModelError."""
    parts = (*NETWORKS, "tokenizer", "tokenizer_2", "tokenizer_3", "scheduler", "clip")
    files = [*directory.glob("*.json"), *(file for part in parts for file in (directory / part).glob("*.*"))]
    with loading("the configs", directory):
        return sha256_of(*sorted(file for file in files if file.suffix in (".json", ".txt")), named_in=directory)


def network_hash(folder: Path) -> str:
    """sha256 of the weights of one network. Raises ModelError."""
    with loading(folder):
        return sha256_of(*weight_files(folder))


def parameter_counts(directory: Path) -> dict[str, int]:
    """Number of parameters of each part, from the headers of its weights."""
    counts: dict[str, int] = {}
    for part in (*NETWORKS, "clip"):
        if (directory / part).is_dir():
            files = sorted((directory / part).glob("*.safetensors")) if part == "clip" else None
            counts[part] = sum(map(numbers_in, files or weight_files(directory / part)))
    return counts


def quantized_parts(directory: Path) -> dict[str, list[str]]:
    """The parts of a model folder with weights in blocks, and the types of their tensors."""
    files = {part: directory / part / GGUF for part in NETWORKS}
    return {part: gguf_file.types_in(file) for part, file in files.items() if file.is_file()}


def numbers_in(file: Path) -> int:
    """The number of values in a file of weights, from its header."""
    from safetensors import safe_open

    if gguf_file.is_gguf(file):
        return gguf_file.numbers_in(file)
    with loading(file.parent.name, file.parent.parent), safe_open(file, "np") as weights:
        names = weights.keys()  # not a mapping: it cannot be iterated
        return sum(math.prod(weights.get_slice(name).get_shape()) for name in names)


def picture_geometry(directory: Path) -> tuple[int, tuple[int, int]]:
    """The multiple that sides in pixels must have, and the model's (height, width), from its configs alone."""
    with loading("the configs", directory):
        part = "unet" if (directory / "unet").is_dir() else "transformer"
        backbone = read_json(directory / part / "config.json")
        sample = backbone["sample_size"] if part == "unet" else backbone.get("sample_size", _NO_SIZE)
        if type(sample) is not int or sample < 1:
            raise ModelError(f"{part}/config.json: sample_size must be a whole number of latents (got {sample!r})")
        vae = directory / "vae" / "config.json"
        factor = _factor(read_json(vae)) if vae.is_file() else 1
        multiple = 1 if part == "unet" else _TOKEN if "sample_size" not in backbone else int(backbone["patch_size"])
        return factor * multiple, (sample * factor, sample * factor)


def _factor(vae: dict[str, Any]) -> int:
    """Pixels of a latent's side. Tiny and video VAEs have another name for the entry with one value for each level."""
    levels = vae.get("block_out_channels") or vae.get("decoder_block_out_channels") or vae["dim_mult"]
    return int(2 ** (len(levels) - 1))
