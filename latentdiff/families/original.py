"""A Stable Diffusion model written as one .safetensors file in the original layout; `single_file` reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig

from latentdiff.core.errors import ConfigError, raised_as, saving
from latentdiff.diffusion.path import VariancePreserving
from latentdiff.families.scheduler import same_schedule
from latentdiff.families.single_file import AnyTexts, unet_config, vae_config
from latentdiff.formats.original import (
    CLIP,
    OPEN_CLIP,
    SCALING,
    UNET,
    VAE,
    VOCABULARY,
    Kind,
    open_clip_name,
    unet_name,
    vae_name,
)
from latentdiff.model import Model
from latentdiff.networks.backbones.unet import UNet
from latentdiff.networks.codecs.kl import KLAutoencoder
from latentdiff.networks.encoders.clip import TextEncoder
from latentdiff.networks.encoders.second_clip import SecondTextEncoder
from latentdiff.networks.encoders.two_clips import TwoTextEncoders

State = dict[str, Tensor]


def save_single_file(model: Model, path: Path) -> None:
    """Write a model. Raises ConfigError if the layout cannot express its shape, schedule or scale."""
    zero_terminal_snr = _schedule(model)
    unet, texts, autoencoder = model.backbone, model.encoder, model.codec
    if not (isinstance(unet, UNet) and isinstance(texts, AnyTexts)):
        raise _another_shape()
    if not isinstance(autoencoder, KLAutoencoder):
        raise _another_shape()
    if not autoencoder.has_encoder:
        raise ConfigError("a single file requires a complete VAE; this one has no encoder")
    kind = _kind(autoencoder, texts, unet)
    if any(len(encoder.tokenizer) > VOCABULARY for encoder in texts.encoders):
        raise ConfigError("a single file cannot hold learnt words. Use a folder")
    if model.prediction not in ("epsilon", "v_prediction"):
        raise ConfigError(f"a single file cannot say that its U-Net predicts {model.prediction}. Use a folder")
    try:
        state = {UNET + unet_name(name, unet.model.config): t for name, t in _weights(unet.model)}
    except KeyError:
        raise _another_shape() from None
    levels = len(autoencoder.vae.config.block_out_channels)
    state |= {VAE + vae_name(name, levels): _as_conv(name, t) for name, t in _weights(autoencoder.vae)}
    state |= _text_state(texts, kind)
    _check_implied(state, kind, model)
    if model.prediction == "v_prediction":
        state["v_pred"] = torch.zeros(0)
    if zero_terminal_snr:
        state["ztsnr"] = torch.zeros(0)
    predicts = "v" if model.prediction == "v_prediction" else model.prediction
    with saving(path.name, path.parent):  # one entry of metadata, since safetensors writes several in random order
        contiguous = {name: tensor.contiguous() for name, tensor in state.items()}
        save_file(contiguous, path, {"modelspec.prediction_type": predicts})


def _check_implied(state: State, kind: Kind, model: Model) -> None:
    """Check that the networks which a reader infers from the file's shapes are these. Raises ConfigError.

    Shapes do not show the number of heads, the epsilon of norms, how times are embedded, and the like.
    """
    unet, texts, codec = cast(Any, model.backbone), cast(Any, model.encoder), cast(Any, model.codec)
    with raised_as(ConfigError, "a single file cannot describe this model. Use a folder"), torch.device("meta"):
        implied = {
            "U-Net": (UNet2DConditionModel(**unet_config(state, kind)), unet.model),
            "VAE": (AutoencoderKL(**vae_config(state, kind)), codec.vae),
        }
    for name, (theirs, ours) in implied.items():
        if key := _first_other(theirs.config, ours.config):
            raise ConfigError(f"a single file cannot say that {key} of its {name} is {ours.config[key]}. Use a folder")
        if _computes(theirs) != _computes(ours):
            raise ConfigError(f"a single file cannot say what its {name} computes: heads or norms. Use a folder")
    for encoder in texts.encoders:
        config = encoder.model.config
        if config.num_attention_heads != max(config.hidden_size // 64, 1):
            raise ConfigError("a single file cannot say how many heads its text encoder has. Use a folder")
        if config.layer_norm_eps != CLIPTextConfig().layer_norm_eps:
            raise ConfigError("a single file cannot say the epsilon of its text encoder's norms. Use a folder")


_WITHOUT_EFFECT = {"sample_size", "scaling_factor", "force_upcast", "upcast_attention", "act_fn"}  # or named elsewhere


def _first_other(theirs: Any, ours: Any) -> str | None:
    """The first key of two configs whose single values differ; lists are compared by the networks they make."""
    for key, value in sorted(theirs.items()):
        own = ours.get(key, value)
        single = not isinstance(value, list | tuple | dict) and not isinstance(own, list | tuple | dict)
        heads = key in ("attention_head_dim", "num_attention_heads", "transformer_layers_per_block")
        absent = (value is None) != (own is None)
        if key[0] != "_" and key not in _WITHOUT_EFFECT and not heads and own != value and (single or absent):
            return key
    return None


def _computes(network: torch.nn.Module) -> list[tuple[str, str, Any]]:
    """The layers of a network with what their weights do not show."""
    return [
        (name, str(layer), getattr(layer, "heads", None))
        for name, layer in network.named_modules()
        if hasattr(layer, "heads") or not list(layer.children())
    ]


def _schedule(model: Model) -> bool:
    """Whether the schedule is rescaled to zero terminal SNR. Raises ConfigError unless it is Stable Diffusion's."""
    own, plain = model.path, VariancePreserving.scaled_linear()
    for zero, kind in ((False, plain), (True, plain.zero_terminal_snr())):
        if isinstance(own, VariancePreserving) and same_schedule(kind, own):
            return zero
    raise ConfigError("the noise schedule is not Stable Diffusion's, which a single file implies. Use a folder")


def _another_shape() -> ConfigError:
    return ConfigError("a single file requires the shape of a Stable Diffusion model. Use a folder")


def _kind(autoencoder: KLAutoencoder, texts: AnyTexts, unet: UNet) -> Kind:
    """Which Stable Diffusion a model is."""
    config = unet.model.config
    if isinstance(texts, TwoTextEncoders):
        kind: Kind = "XL"
    elif isinstance(texts, SecondTextEncoder):
        kind = "XL refiner"
    else:
        kind = "2" if texts.model.config.hidden_act == "gelu" else "1"
    plain = config.addition_embed_type == ("text_time" if kind.startswith("XL") else None)
    if not (plain and config.resnet_time_scale_shift == "default"):
        raise _another_shape()
    if autoencoder.scale != SCALING[kind] or autoencoder.shift:
        raise ConfigError(f"a single file implies latents scaled by {SCALING[kind]}, not {autoencoder.scale}")
    return kind


def _weights(network: torch.nn.Module) -> list[tuple[str, Tensor]]:
    return list(network.state_dict().items())


def _as_conv(name: str, tensor: Tensor) -> Tensor:
    """Attention weights of the autoencoder as 1 x 1 convolutions, which the original layout has."""
    return tensor[..., None, None] if "attentions" in name and tensor.ndim == 2 else tensor


def _text_state(texts: AnyTexts, kind: Kind) -> State:
    if isinstance(texts, TwoTextEncoders):
        return _clip_state(texts.first, kind) | _open_clip_state(texts.second, kind)
    if isinstance(texts, SecondTextEncoder):
        return _open_clip_state(texts.second, kind)
    return (_clip_state if kind == "1" else _open_clip_state)(texts, kind)


def _clip_state(encoder: TextEncoder, kind: Kind) -> State:
    prefix = f"{CLIP[kind]}text_model."
    return {prefix + name.removeprefix("text_model."): tensor for name, tensor in _weights(encoder.model)}


def _open_clip_state(encoder: TextEncoder, kind: Kind) -> State:
    """The text encoder in OpenCLIP's layout: query, key and value as one matrix, and a transposed projection."""
    state = {open_clip_name(name): tensor for name, tensor in _weights(encoder.model)}
    if kind == "2":
        state |= _silent_layer(state, encoder.layers)
    merged: State = {}
    for name, tensor in state.items():
        if name == "text_projection.weight":
            merged["text_projection"] = tensor.T
        elif ".q_proj." in name:
            parts = [state[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            merged[name.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
        elif ".k_proj." not in name and ".v_proj." not in name:
            merged[name] = tensor
    return {OPEN_CLIP[kind] + name: tensor for name, tensor in merged.items()}


def _silent_layer(state: State, layers: int) -> State:
    """A last layer that adds nothing. Stable Diffusion 2 does not read its last layer, and folders omit it."""
    before, last = (f"transformer.resblocks.{layer}." for layer in (layers - 1, layers))
    copied = {name.replace(before, last): tensor for name, tensor in state.items() if name.startswith(before)}
    silenced = ("attn.out_proj", "mlp.c_proj")
    return {n: torch.zeros_like(t) if any(part in n for part in silenced) else t.clone() for n, t in copied.items()}
