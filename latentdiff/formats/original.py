"""A pipeline's weights under the names of Stable Diffusion's original layout: what `single_file` reads, written.

The names are a table; diffusers' conversion, which goes the other way, is the proof of it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from latentdiff.core.errors import ConfigError, saving
from latentdiff.formats.single_file import CLIP, OPEN_CLIP, SCALING, UNET, VAE, VOCABULARY, Family
from latentdiff.networks.backbones.unet import UNet
from latentdiff.networks.codecs.kl import Autoencoder, TinyAutoencoder
from latentdiff.networks.encoders.clip import TextEncoder
from latentdiff.networks.encoders.two_clips import DualTextEncoder

State = dict[str, Tensor]
_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE = {
    "mid_block.resnets.0.": "mid.block_1.",
    "mid_block.resnets.1.": "mid.block_2.",
    "mid_block.attentions.0.": "mid.attn_1.",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "self_attn": "attn",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "fc1": "c_fc",
    "fc2": "c_proj",
}


def save_single_file(
    path: Path,
    autoencoder: object,
    text_encoder: TextEncoder | DualTextEncoder,
    unet: UNet,
    *,
    prediction: str,
    zero_terminal_snr: bool,
) -> None:
    """Write the three networks as one file. Raises ConfigError where the layout has no place for them."""
    family = _family(autoencoder, text_encoder, unet)
    if any(len(encoder.tokenizer) > VOCABULARY for encoder in text_encoder.encoders):
        raise ConfigError("the text encoder has learnt words, which a single file has no place for. Use a folder")
    assert isinstance(autoencoder, Autoencoder)
    if prediction == "sample":
        raise ConfigError("a single file cannot say that its U-Net predicts the sample. Use a folder")
    state = {UNET + unet_name(name, unet.model.config): t for name, t in _weights(unet.model)}
    levels = len(autoencoder.vae.config.block_out_channels)
    state |= {VAE + vae_name(name, levels): _as_conv(name, t) for name, t in _weights(autoencoder.vae)}
    if isinstance(text_encoder, DualTextEncoder):
        state |= _clip_state(text_encoder.first, family) | _open_clip_state(text_encoder.second, family)
    else:
        state |= (_clip_state if family == "1" else _open_clip_state)(text_encoder, family)
    if prediction == "v_prediction":
        state["v_pred"] = torch.zeros(0)
    if zero_terminal_snr:
        state["ztsnr"] = torch.zeros(0)
    metadata = {"modelspec.prediction_type": "v" if prediction == "v_prediction" else prediction}  # one: else unordered
    with saving(path.name, path.parent):
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata)


def _family(autoencoder: object, text_encoder: TextEncoder | DualTextEncoder, unet: UNet) -> Family:
    """Which of the families a model is of; others have no original layout."""
    config = unet.model.config
    if isinstance(text_encoder, DualTextEncoder):
        family: Family = "XL"
    else:
        family = "2" if text_encoder.model.config.hidden_act == "gelu" else "1"
    plain = config.addition_embed_type == ("text_time" if family == "XL" else None)
    plain = plain and not isinstance(autoencoder, TinyAutoencoder)
    if not (isinstance(autoencoder, Autoencoder) and plain and config.resnet_time_scale_shift == "default"):
        raise ConfigError("this model is not of Stable Diffusion's shape, which a single file must have. Use a folder")
    if autoencoder.scale != SCALING[family] or autoencoder.shift:
        raise ConfigError(f"latents scaled by {autoencoder.scale}, not {SCALING[family]}, are for a folder to say")
    return family


def _weights(network: torch.nn.Module) -> list[tuple[str, Tensor]]:
    return list(network.state_dict().items())


def unet_name(name: str, config: Any) -> str:
    """Diffusers' name of a U-Net's weight in the original layout, by the blocks that its config describes."""
    for theirs, ours in _UNET.items():
        if name.startswith(theirs + "."):
            rest = name.removeprefix(theirs)
            return ours + (_resnet(rest) if "resnets" in theirs else rest)
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)(\..*)", name)
    assert found, name
    way, level, kind, place, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
    blocks = config.layers_per_block + 1  # going down with the downsampling, going up one residual block more
    if kind == "downsamplers":
        return f"input_blocks.{blocks * (level + 1)}.0.op{rest.removeprefix('.conv')}"
    if kind == "upsamplers":
        after = 2 if config.up_block_types[level].startswith("CrossAttn") else 1
        return f"output_blocks.{blocks * (level + 1) - 1}.{after}{rest}"
    block = f"input_blocks.{blocks * level + place + 1}" if way == "down" else f"output_blocks.{blocks * level + place}"
    return f"{block}.0{_resnet(rest)}" if kind == "resnets" else f"{block}.1{rest}"


def _resnet(rest: str) -> str:
    part, kind = rest.removeprefix(".").rsplit(".", 1)
    return f".{_RESNET[part]}.{kind}"


def vae_name(name: str, levels: int) -> str:
    """Diffusers' name of an autoencoder's weight in the original layout; going up, levels are counted from below."""
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d+)\.", r"down.\1.", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda found: f"up.{levels - 1 - int(found[1])}.block.", name)
    name = re.sub(r"up_blocks\.(\d+)\.", lambda found: f"up.{levels - 1 - int(found[1])}.", name)
    return _renamed(name, _VAE)


def _as_conv(name: str, tensor: Tensor) -> Tensor:
    """The autoencoder's attention was made of 1 x 1 convolutions."""
    return tensor[..., None, None] if "attentions" in name and tensor.ndim == 2 else tensor


def _clip_state(encoder: TextEncoder, family: Family) -> State:
    return {f"{CLIP[family]}text_model.{_bare(name)}": tensor for name, tensor in _weights(encoder.model)}


def _open_clip_state(encoder: TextEncoder, family: Family) -> State:
    """OpenCLIP keeps query, key and value as one matrix, and a projection to be multiplied from the other side."""
    state = {_renamed(_bare(name), _OPEN_CLIP): tensor for name, tensor in _weights(encoder.model)}
    if family == "2":
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
    return {OPEN_CLIP[family] + name: tensor for name, tensor in merged.items()}


def _silent_layer(state: State, layers: int) -> State:
    """The last layer, which Stable Diffusion 2 does not read and folders leave out: one that adds nothing."""
    before, last = (f"transformer.resblocks.{layer}." for layer in (layers - 1, layers))
    copied = {name.replace(before, last): tensor for name, tensor in state.items() if name.startswith(before)}
    silenced = ("attn.out_proj", "mlp.c_proj")
    return {n: torch.zeros_like(t) if any(part in n for part in silenced) else t.clone() for n, t in copied.items()}


def _bare(name: str) -> str:
    return name.removeprefix("text_model.")


def _renamed(name: str, table: dict[str, str]) -> str:
    for theirs, ours in table.items():
        name = name.replace(theirs, ours)
    return name
