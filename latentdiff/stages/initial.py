"""A run whose denoiser begins with the networks of a finished model (`denoiser.initial`) instead of random weights.

The model's autoencoder, text encoder and CLIP take the places in the run folder that the earlier stages would fill, so
that the denoiser is the only stage of the run.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import torch

from latentdiff.core.errors import ConfigError, saving
from latentdiff.core.files import atomic
from latentdiff.families.loading import stored_model
from latentdiff.model import ModelCard
from latentdiff.networks.backbones.dit import DiT
from latentdiff.networks.backbones.unet import UNet
from latentdiff.networks.codecs.kl import KLAutoencoder
from latentdiff.networks.encoders.clip import TextEncoder
from latentdiff.runtime.device import moved


class _Networks(NamedTuple):
    codec: KLAutoencoder
    encoder: TextEncoder
    backbone: UNet
    card: ModelCard


def place_networks(initial: str, folder: Path) -> None:
    """Write what the earlier stages would have trained into the run folder, unless it is there.

    Raises ConfigError for a model that has another kind of networks, ModelError.
    """
    vae, texts = folder / "model" / "vae", folder / "clip"
    if vae.is_dir() and texts.is_dir():
        return
    networks = _networks(initial)
    with saving("the initial model", folder):
        with atomic(vae) as made:
            networks.codec.save(made)
        clip = networks.card.folder and networks.card.folder / "clip"
        if clip is not None and clip.is_dir():
            with atomic(folder / "model" / "clip") as made:
                shutil.copytree(clip, made, dirs_exist_ok=True)
        with atomic(texts) as made:  # last: where it is, the others are
            networks.encoder.save(made)


def load_weights(initial: str, backbone: UNet | DiT) -> None:
    """Give the U-Net the initial model's weights. Raises ConfigError if it has another shape."""
    theirs, own = _networks(initial).backbone.state_dict(), backbone.state_dict()
    for name in sorted(theirs.keys() | own.keys()):
        shapes = [tuple(state[name].shape) if name in state else "none" for state in (theirs, own)]
        if shapes[0] != shapes[1]:
            raise ConfigError(
                f"denoiser.initial: the U-Net of {initial} has another shape than this config's "
                f"({name.removeprefix('model.')}: {shapes[0]}, not {shapes[1]})"
            )
    backbone.load_state_dict(theirs)


def _networks(initial: str) -> _Networks:
    model = moved(stored_model(initial), "cpu", torch.float32)
    codec, encoder, backbone = model.codec, model.encoder, model.backbone
    if not (isinstance(codec, KLAutoencoder) and isinstance(encoder, TextEncoder) and isinstance(backbone, UNet)):
        raise ConfigError(f"denoiser.initial: {initial} is not a model of a VAE, a CLIP text encoder and a U-Net")
    return _Networks(codec, encoder, backbone, model.card)
