"""The networks of a model folder, built and filled. Nothing is fetched; nothing but safetensors is read."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from latentdiff.errors import ModelError
from latentdiff.models.autoencoder import Autoencoder, IdentityAutoencoder
from latentdiff.models.folder import loading, parameter_counts, read_json
from latentdiff.models.text_encoder import TextEncoder
from latentdiff.models.unet import UNet

if TYPE_CHECKING:
    from latentdiff.models.clip import Clip


def load_autoencoder(directory: Path) -> Autoencoder | IdentityAutoencoder:
    """The VAE of a model folder, or the identity where it has none."""
    from diffusers import AutoencoderKL

    if not (directory / "vae").is_dir():
        return _identity(directory)
    autoencoder = _pretrained(AutoencoderKL, directory, "vae", Autoencoder)
    if not (math.isfinite(autoencoder.scale) and autoencoder.scale > 0 and math.isfinite(autoencoder.shift)):
        raise ModelError(f"vae/config.json: scaling_factor or shift_factor is no positive number ({directory})")
    return autoencoder


def _identity(directory: Path) -> IdentityAutoencoder:
    channels = read_json(directory / "unet" / "config.json").get("in_channels")
    if channels not in (1, 3):
        raise ModelError(f"no vae, and a U-Net of {channels} channels draws no picture ({directory})")
    return IdentityAutoencoder(channels)


def load_text_encoder(directory: Path) -> TextEncoder:
    """Tokenizer and CLIP text model of a model folder."""
    from transformers import CLIPTextModel, CLIPTokenizer

    with loading("tokenizer", directory):
        if not (directory / "tokenizer").is_dir():  # else it is sought on the hub
            raise ModelError(f"tokenizer is missing ({directory})")
        tokenizer = CLIPTokenizer.from_pretrained(directory / "tokenizer", local_files_only=True)
    encoder = _pretrained(CLIPTextModel, directory, "text_encoder", lambda model: TextEncoder(tokenizer, model))
    read, positions = tokenizer.model_max_length, encoder.model.config.max_position_embeddings
    if not (isinstance(read, int) and 2 <= read <= positions):
        raise ModelError(f"tokenizer reads {read} tokens, the text encoder has {positions} positions ({directory})")
    return encoder


def load_unet(directory: Path) -> UNet:
    """The U-Net of a model folder."""
    from diffusers import UNet2DConditionModel

    return _pretrained(UNet2DConditionModel, directory, "unet", UNet)


def load_clip(directory: Path) -> Clip:
    """The contrastive towers that the text encoder of a model folder comes from."""
    from safetensors import safe_open

    from latentdiff.models.clip import Clip  # open_clip takes seconds to import

    with loading("clip", directory), safe_open(directory / "text_encoder" / "model.safetensors", "pt") as weights:
        (name,) = (key for key in weights.keys() if key.endswith("token_embedding.weight"))  # noqa: SIM118
        return Clip.load(directory / "clip", weights.get_tensor(name))


def _pretrained(network: Any, directory: Path, part: str, adapter: Any) -> Any:
    """The adapter around a network of a checked folder, in evaluation mode; every weight of it comes from the file."""
    with loading(part, directory):
        if not (directory / part / "config.json").is_file():  # else it is sought on the hub
            raise ModelError(f"{part} is missing ({directory})")
        _check_size(network, directory, part)
        model, told = network.from_pretrained(
            directory / part, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        absent = sorted(told["missing_keys"])
        if absent:
            raise ModelError(f"{part}: {len(absent)} weights are missing, the first is {absent[0]} ({directory})")
        return adapter(model).eval()


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


def weights_hash(network: nn.Module) -> str:
    """sha256 of a network's tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
