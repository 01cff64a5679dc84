"""IP-Adapters, read from single .safetensors files, with the CLIP that reads their pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from latentdiff.core.errors import ConfigError, ModelError, loading
from latentdiff.core.files import let_others_read
from latentdiff.formats import folder
from latentdiff.model import Model
from latentdiff.networks.protocols import PromptedByPictures

if TYPE_CHECKING:
    from latentdiff.networks.controls.ip_adapter import ImageEncoder, IPAdapter

PART = "ip_adapter"
ENCODER = "image_encoder"
FILE = "ip_adapter.safetensors"
_CLASSES = frozenset({"CLIPVisionModelWithProjection"})


def place_of(path: Path, subfolder: str = "", weight_name: str | None = None) -> Path:
    """The file of an adapter: a file, or the one of this name in a folder. Raises ModelError."""
    place = path / subfolder
    if place.is_dir():
        if weight_name is None and not (place / FILE).is_file():
            raise ModelError(f"no {FILE} in {place}. Name its file by weight_name")
        place /= weight_name or FILE
    if not place.is_file():
        raise ModelError(f"no such file ({place})")
    return place


def encoder_of(file: Path, root: Path, named: str | Path) -> Path:
    """The folder of an image encoder: beside the adapter's file, or a path in the root or by itself. Raises ModelError.

    named: as in diffusers a name is beside the file, a path with a slash is in `root`.
    """
    beside = isinstance(named, str) and "/" not in named
    places = [file.parent / named] if beside else [root / named, Path(named)]
    place = next((each for each in places if (each / "config.json").is_file()), None)
    if place is None:
        raise ModelError(
            f"no image encoder in {places[0]}. Name it by image_encoder_folder; None requires ip_adapter_image_embeds"
        )
    return place


def load_ip_adapter(file: Path, encoder: Path | None, model: Model) -> IPAdapter:
    """An adapter for a model, on the CPU in its stored precision. Raises ConfigError, ModelError, UnsafeError."""
    from safetensors.torch import load_file

    from latentdiff.formats.pickle import check_safetensors
    from latentdiff.networks.controls.ip_adapter import from_state

    backbone = model.backbone
    if not (isinstance(backbone, PromptedByPictures) and backbone.prompted_layers):
        raise ConfigError("an IP-Adapter requires a U-Net, which this model does not have")
    check_safetensors(file, ". `latentdiff convert --trust-pickle` converts it")
    with loading(file):
        state = load_file(file)
        odd = [name for name, tensor in state.items() if not tensor.is_floating_point() or tensor.itemsize < 2]
        if odd:
            raise ModelError(f"weights must be floating point of 16 bits or more (got {odd[0]} in {file})")
        groups = {name.partition(".")[0] for name in state}
        if groups != {"image_proj", "ip_adapter"}:
            raise ModelError(f"no IP-Adapter: its names begin with {', '.join(sorted(groups)[:3])} ({file})")
        if "image_proj.norm.weight" in state and "image_proj.proj.2.weight" in state:
            raise ModelError(f"IP-Adapters of faces are not supported: CLIP does not give their features ({file})")
        tower = None if encoder is None else load_image_encoder(encoder)
        adapter = from_state(backbone.prompted_layers, int(backbone.spec.reads["tokens"][-1] or 0), state, tower)
        check_fit(adapter, model, file)
        return adapter


def load_image_encoder(place: Path) -> ImageEncoder:
    """CLIP's tower of pictures from its folder. Raises ModelError, UnsafeError."""
    from transformers import CLIPVisionModelWithProjection

    from latentdiff.families.weights import pretrained
    from latentdiff.networks.controls.ip_adapter import ImageEncoder

    checked = folder.check_network(place, ENCODER, _CLASSES)
    return ImageEncoder(
        pretrained(CLIPVisionModelWithProjection, checked.parent, checked.name, None, ImageEncoder)
    ).eval()


def image_encoder_for(model: Model, place: Path | None) -> ImageEncoder:
    """CLIP's tower of pictures from a folder, or by default the model's own. Raises ConfigError, ModelError."""
    if place is not None:
        return load_image_encoder(place)
    from latentdiff.families.weights import load_clip
    from latentdiff.networks.clip import image_model_of
    from latentdiff.networks.controls.ip_adapter import ImageEncoder

    own = model.card.folder
    if own is None or not (own / "clip").is_dir():
        raise ConfigError("this model has no CLIP of its own. Name an image encoder (--image-encoder)")
    return ImageEncoder(image_model_of(load_clip(own))).eval()


def save_ip_adapter(adapter: IPAdapter, directory: Path) -> list[Path]:
    """Write an adapter's file and its image encoder, as this package and diffusers load them; returns the paths."""
    from safetensors.torch import save_file

    from latentdiff.networks.saving import save_network

    directory.mkdir(parents=True, exist_ok=True)
    file, folder = directory / FILE, directory / ENCODER
    save_file(adapter.state(), file)
    assert adapter.encoder is not None
    save_network(adapter.encoder.model, folder)
    let_others_read(directory)
    return [file, folder]


def check_fit(adapter: IPAdapter, model: Model, file: Path) -> None:
    """Raises ModelError for an adapter whose widths are not the model's or its image encoder's."""
    import torch

    width, own = model.backbone.spec.reads["tokens"][-1], adapter.keys[0].in_features
    if own != width:
        raise ModelError(
            f"an IP-Adapter for another model: its tokens have {own} numbers, the U-Net reads {width} ({file})"
        )
    if adapter.encoder is None:
        return
    side = adapter.encoder.model.config.image_size
    with torch.no_grad(), loading(f"{file} with its image encoder"):
        adapter(adapter.encoder(torch.zeros(1, 3, side, side), all_states=adapter.reads_all_states)[None])
