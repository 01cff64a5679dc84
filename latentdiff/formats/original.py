"""The original layout of Stable Diffusion, which single files have: prefixes, and diffusers' names of its weights.

The names are a table; the tests compare it with diffusers' conversion, which goes the other way.
"""

from __future__ import annotations

import re
from typing import Any, Literal

Kind = Literal["1", "2", "XL", "XL refiner"]
UNET, VAE = "model.diffusion_model.", "first_stage_model."
EMA = "model_ema.diffusion_model"  # and a name without its dots
CLIP = {"1": "cond_stage_model.transformer.", "XL": "conditioner.embedders.0.transformer."}
OPEN_CLIP = {
    "2": "cond_stage_model.model.",
    "XL": "conditioner.embedders.1.model.",
    "XL refiner": "conditioner.embedders.0.model.",
}
SCALING = {"1": 0.18215, "2": 0.18215, "XL": 0.13025, "XL refiner": 0.13025}
VOCABULARY, POSITIONS = 49408, 77

_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",
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


def unet_name(name: str, config: Any) -> str:
    """diffusers' name of a U-Net's weight in the original layout, by the blocks that its config describes.

    Raises KeyError for a weight that the layout does not have.
    """
    for theirs, ours in _UNET.items():
        if name.startswith(theirs + "."):
            rest = name.removeprefix(theirs)
            return ours + (_resnet(rest) if "resnets" in theirs else rest)
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)(\..*)", name)
    if match is None:
        raise KeyError(name)
    if not isinstance(config.layers_per_block, int):
        raise KeyError(name)  # the original layout has one number for all levels
    way, level, kind, place, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    blocks = config.layers_per_block + 1  # with the downsampling, or one residual block more going up
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
    """diffusers' name of a VAE's weight in the original layout, which counts the decoder's levels from below."""
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d+)\.", r"down.\1.", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda match: f"up.{levels - 1 - int(match[1])}.block.", name)
    name = re.sub(r"up_blocks\.(\d+)\.", lambda match: f"up.{levels - 1 - int(match[1])}.", name)
    return _renamed(name, _VAE)


def open_clip_name(name: str) -> str:
    """transformers' name of a text encoder's weight in OpenCLIP's layout, where query, key and value are one matrix."""
    return _renamed(name.removeprefix("text_model."), _OPEN_CLIP)


def _renamed(name: str, table: dict[str, str]) -> str:
    for theirs, ours in table.items():
        name = name.replace(theirs, ours)
    return name
