"""Model folders on disk: what is refused before anything is built, and the networks that are built from them.

A folder is diffusers' layout: model_index.json and a sub-folder with config.json and safetensors weights for each
network. Nothing is fetched and nothing but JSON and safetensors is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from latentdiff.errors import ModelError, UnsafeError
from latentdiff.models.autoencoder import Autoencoder, IdentityAutoencoder
from latentdiff.models.text_encoder import TextEncoder
from latentdiff.models.unet import UNet

if TYPE_CHECKING:
    from latentdiff.models.clip import Clip

KNOWN_CLASSES = {
    "vae": {"AutoencoderKL"},
    "unet": {"UNet2DConditionModel"},
    "text_encoder": {"CLIPTextModel"},
    "tokenizer": {"CLIPTokenizer", "CLIPTokenizerFast"},
}
LARGEST_NUMBER = 200_000  # of any size in a config; Stable Diffusion's largest is its vocabulary, 49,408
LARGEST_DEPTH = 1000  # of any number of layers; each is an object, even where it takes no memory for weights
_ASKS_TO_RUN_CODE = ("auto_map", "custom_pipelines", "_attn_implementation_internal", "trust_remote_code")


def check_folder(directory: Path) -> dict[str, Any]:
    """Refuse a folder that is not a model or asks to run code; returns its model_index. Builds nothing."""
    if not directory.is_dir():
        raise ModelError(f"no such model folder ({directory}). Give a folder with a model_index.json")
    if not (directory / "model_index.json").is_file():
        raise ModelError(f"no model_index.json ({directory}). Give a folder in diffusers' layout")
    for file in sorted(directory.rglob("*")):
        if file.suffix == ".py":
            raise UnsafeError(
                f"model directory asks to run code ({file.relative_to(directory)}). latentdiff never does this"
            )
        if file.suffix == ".json":
            _check_json(file, directory)
        elif file.is_file() and _is_pickle(file):
            raise UnsafeError(
                f"{file.relative_to(directory)} is a pickle file ({directory}). latentdiff loads safetensors only"
            )
    index: dict[str, Any] = json.loads((directory / "model_index.json").read_text())
    _check_classes(index, directory)
    return index


def _check_classes(index: dict[str, Any], directory: Path) -> None:
    for part, known in KNOWN_CLASSES.items():
        entry = index.get(part)
        if part == "vae" and entry in (None, [None, None]):
            continue  # a pixel-space model
        name = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if name not in known:
            raise UnsafeError(
                f"{part} is of unknown class {name} ({directory}/model_index.json). Known: {', '.join(sorted(known))}"
            )
        if part != "tokenizer" and not (directory / part / "config.json").is_file():
            raise ModelError(f"{part}/config.json is missing ({directory})")


def _check_json(file: Path, directory: Path) -> None:
    name = str(file.relative_to(directory))
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{name} is not valid JSON ({directory}): {error}") from None
    if file.parent.name == "tokenizer":
        return  # vocabularies: words and numbers that build nothing
    for key, value in _entries(tree):
        if key in _ASKS_TO_RUN_CODE:
            raise UnsafeError(f"model directory asks to run code ({key} in {name}). latentdiff never does this")
        if key == "weight_map" and any("/" in str(v) or "\\" in str(v) for v in dict(value).values()):
            raise UnsafeError(f"{name} names shards outside its folder ({directory})")
        largest = LARGEST_DEPTH if "layers" in key else LARGEST_NUMBER
        if isinstance(value, int) and abs(value) > largest and key != "total_size":
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
    """By content: pickle protocols 2 and up open with 0x80, torch's archives are zip files that hold data.pkl.

    A safetensors file opens with the 8-byte length of a JSON header, then "{".
    """
    with file.open("rb") as handle:
        head = handle.read(9)
    if file.suffix.lower() == ".safetensors":
        return head[8:9] != b"{"
    return file.suffix.lower() in (".bin", ".pt", ".pth", ".ckpt", ".pkl") or head[:2] in (
        b"\x80\x02",
        b"\x80\x03",
        b"\x80\x04",
        b"\x80\x05",
    )


@contextmanager
def _loading(part: str, directory: Path) -> Iterator[None]:
    """Whatever a library raises while it reads a part becomes a ModelError of one line."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"cannot load {part} ({directory}): {reason}") from error


def _pretrained(network: Any, directory: Path, part: str) -> Any:
    """from_pretrained of a part of a checked folder: local, safetensors only."""
    with _loading(part, directory):
        _check_size(network, directory, part)
        return network.from_pretrained(directory / part, local_files_only=True, use_safetensors=True)


def _check_size(network: Any, directory: Path, part: str) -> None:
    """Refuse a config that describes a larger network than the weights fill, before memory is taken for it.

    Twice as large, not merely larger: the loaders name what does not fit, and old checkpoints may lack a buffer.
    """
    folder = directory / part
    with torch.device("meta"):
        if hasattr(network, "load_config"):  # diffusers
            skeleton = network.from_config(network.load_config(folder, local_files_only=True))
        else:
            skeleton = network(network.config_class.from_pretrained(folder, local_files_only=True))
    described, held = sum(p.numel() for p in skeleton.parameters()), parameter_counts(directory).get(part, 0)
    if described > 2 * held:
        raise ModelError(
            f"{part}/config.json describes {described:,} parameters, its weights hold {held:,} ({directory})"
        )


def load_autoencoder(directory: Path) -> Autoencoder | IdentityAutoencoder:
    """The VAE of a model folder, or the identity where it has none."""
    from diffusers import AutoencoderKL

    if not (directory / "vae").is_dir():
        return IdentityAutoencoder(json.loads((directory / "unet" / "config.json").read_text())["in_channels"])
    return Autoencoder(_pretrained(AutoencoderKL, directory, "vae")).eval()


def load_text_encoder(directory: Path) -> TextEncoder:
    """Tokenizer and CLIP text model of a model folder."""
    from transformers import CLIPTextModel, CLIPTokenizer

    with _loading("tokenizer", directory):
        tokenizer = CLIPTokenizer.from_pretrained(directory / "tokenizer", local_files_only=True)
    return TextEncoder(tokenizer, _pretrained(CLIPTextModel, directory, "text_encoder")).eval()


def load_unet(directory: Path) -> UNet:
    """The U-Net of a model folder."""
    from diffusers import UNet2DConditionModel

    return UNet(_pretrained(UNet2DConditionModel, directory, "unet")).eval()


def load_clip(directory: Path) -> Clip:
    """The contrastive towers that the text encoder of a model folder comes from."""
    from safetensors import safe_open

    from latentdiff.models.clip import Clip  # open_clip takes seconds to import

    with _loading("clip", directory), safe_open(directory / "text_encoder" / "model.safetensors", "pt") as weights:
        (name,) = (key for key in weights.keys() if key.endswith("token_embedding.weight"))  # noqa: SIM118
        return Clip.load(directory / "clip", weights.get_tensor(name))


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
    from math import prod

    from safetensors import safe_open

    counts: dict[str, int] = {}
    for file in sorted(directory.glob("*/*.safetensors")):
        with safe_open(file, "pt") as weights:
            names = weights.keys()  # not a mapping: it cannot be iterated
            sizes = (prod(weights.get_slice(name).get_shape()) for name in names)
            counts[file.parent.name] = counts.get(file.parent.name, 0) + sum(sizes)
    return counts


def weights_hash(network: nn.Module) -> str:
    """sha256 of a network's tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
