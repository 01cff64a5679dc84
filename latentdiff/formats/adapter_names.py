"""The names of tensors in adapter files: which layer of which network, and which factor of it.

Every trainer has names of its own. What they share is the layer's name, with dots or underscores, in diffusers' layout
or the original one, behind a prefix and before the factor:

    PEFT       unet.mid_block.attentions.0.proj_in.lora_A.weight              (also base_model.model., lora_A.default)
    diffusers  unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight
    kohya      lora_unet_mid_block_attentions_0_proj_in.lora_down.weight      with .alpha; lora_mid, dora_scale
    LyCORIS    lycoris_mid_block_attentions_0_proj_in.hada_w1_a               hada_*, lokr_*, diff, w_norm, b_norm
    ComfyUI    diffusion_model.middle_block.1.proj_in.lora_down.weight        text_encoders.clip_l.transformer....
    OneTrainer lora_transformer_single_transformer_blocks_0_attn_to_k.lora_down.weight
    flux       double_blocks.0.img_attn.qkv.lora_A.weight                     one layer there, three in diffusers

So names are compared with all dots as underscores.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch import nn

from latentdiff.formats.original import unet_name
from latentdiff.formats.original_transformers import original
from latentdiff.networks.adapters.adapter import Networks

Place = tuple[str, str]  # part and module: unet, mid_block.attentions.0.proj_in
Places = tuple[Place, ...]  # of a layer of a file; several if it is one layer there and several here, in this order

_OF_T5 = ("lora_te3_", "text_encoders_t5xxl_transformer_")
_PREFIXES = {
    "transformer": (
        *("lora_unet_", "lora_transformer_", "lycoris_unet_", "lycoris_", "transformer_"),
        *("diffusion_model_", "model_diffusion_model_", ""),
    ),
    "unet": ("lora_unet_", "lycoris_unet_", "lycoris_", "unet_", "diffusion_model_", "model_diffusion_model_", ""),
    "text_encoder": (
        *("lora_te_", "lora_te1_", "lycoris_te_", "lycoris_te1_", "text_encoder_"),
        *("text_encoders_clip_l_transformer_", "text_encoders_clip_h_transformer_"),
    ),
    "text_encoder_2": ("lora_te2_", "lycoris_te2_", "text_encoder_2_", "text_encoders_clip_g_transformer_"),
    "text_encoder_3": ("text_encoder_3_",),
}
_KOHYA = {
    "unet": "lora_unet_",
    "transformer": "lora_transformer_",
    "text_encoder": "lora_te1_",
    "text_encoder_2": "lora_te2_",
}
_PROJECTIONS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}  # of early diffusers

_FACTORS = {
    "lora_A": "lora_A.weight",
    "lora_down": "lora_A.weight",
    "lora.down": "lora_A.weight",
    "lora_linear_layer.down": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_up": "lora_B.weight",
    "lora.up": "lora_B.weight",
    "lora_linear_layer.up": "lora_B.weight",
    "w_norm": "diff",
    "b_norm": "diff_b",
}
_OWN = ("lora_mid", "lora_magnitude_vector", "dora_scale", "alpha", "diff", "diff_b")
_LYCORIS = ("hada_(?:w[12]_[ab]|t[12])", "lokr_(?:w[12](?:_[ab])?|t2)")
_NAME = re.compile(
    rf"(?P<layer>.+?)[._](?P<factor>{'|'.join([*map(re.escape, [*_FACTORS, *_OWN]), *_LYCORIS])})"
    r"(?:\.(?!weight$|bias$)\w+)?"  # the adapter's own name, as PEFT has it in memory
    r"(?:\.(?P<kind>weight|bias))?"
)
_OTHERS = {  # kinds of adapters that no code here computes
    "IA3": r"[._](on_input|ia3_l)\b",
    "GLoRA": r"\.[ab][12]\.weight$",
    "OFT": r"[._]b?oft_",
    "VeRA": r"[._]vera_lambda",
    "HRA": r"[._]hra_u",
}


def other_kind(names: Mapping[str, Any]) -> str | None:
    """The kind of an adapter that is not supported, by the names of its tensors; None if it may be read."""
    return next((kind for kind, mark in _OTHERS.items() if any(re.search(mark, name) for name in names)), None)


def split(name: str) -> tuple[str, str] | None:
    """A tensor's layer, flattened, and its factor by PEFT's or LyCORIS' name; None for a name of no factor."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    layer = match["layer"]
    while layer.startswith("base_model.model."):
        layer = layer.removeprefix("base_model.model.")
    factor = _FACTORS.get(match["factor"], match["factor"])
    if match["kind"] == "bias":
        factor = factor.replace(".weight", ".bias")
    return layer.replace(".processor.", ".").replace(".", "_"), factor


def places(networks: Networks) -> dict[str, Places]:
    """Every name, flattened, under which a file may have a layer of these networks."""
    table: dict[str, Places] = {}
    for part, network in networks.items():
        together: dict[str, dict[int, Place]] = {}  # layers that are one in the original
        for module in _layers(network):
            for name in _names(part, module, network):
                table |= {prefix + name.replace(".", "_"): ((part, module),) for prefix in _prefixes(part, networks)}
            if (first := original(type(network).__name__, module)) is not None:
                together.setdefault(first.name, {})[first.place] = part, module
        for name, each in together.items():
            ordered = tuple(each[place] for place in sorted(each))
            table |= {prefix + name.replace(".", "_"): ordered for prefix in _prefixes(part, networks)}
    return table


def _prefixes(part: str, networks: Networks) -> tuple[str, ...]:
    prefixes = _PREFIXES[part]
    if _is_t5(networks[part]):
        return (f"{part}_", *_OF_T5)
    lone = part == "text_encoder" and "unet" in networks and "text_encoder_2" not in networks
    return (*prefixes, "") if lone else prefixes


def _is_t5(network: nn.Module) -> bool:
    return type(network).__name__ == "T5EncoderModel"


def _layers(network: nn.Module) -> Iterator[str]:
    """The layers that have a weight, whether or not adapters are attached to them."""
    kinds = nn.Linear | nn.Conv2d | nn.GroupNorm | nn.LayerNorm
    for name, layer in network.named_modules():
        if isinstance(layer, kinds) and ".lora_" not in name:
            yield name.removesuffix(".base_layer")


def _names(part: str, module: str, network: nn.Module) -> Iterator[str]:
    if part in ("unet", "transformer"):
        yield module
        yield module.replace(".to_out.0", ".to_out")
        if part == "unet" and (first := _original(module, network)):
            yield first
        return
    plain = module.removeprefix("text_model.")
    early = plain
    for name, other in _PROJECTIONS.items():
        early = early.replace(f"self_attn.{name}", f"self_attn.{other}")
    for name in (plain, early):
        yield name
        yield f"text_model.{name}"


def _original(module: str, network: nn.Module) -> str | None:
    """A U-Net's layer in the original layout; None for one that the layout does not have."""
    try:
        return unet_name(f"{module}.weight", cast(Any, network.config)).removesuffix(".weight")
    except KeyError:
        return None


def kohya_name(place: Place, networks: Networks) -> str:
    """The name that we write: diffusers' layout, and for Stable Diffusion XL the original one, as its trainers do.

    Transformers have OneTrainer's names: the original ones have one layer for several of ours.
    """
    part, module = place
    network = networks[part]
    if part == "transformer" or _is_t5(network):
        return ("lora_te3_" if _is_t5(network) else _KOHYA[part]) + module.replace(".", "_")
    if part == "unet":
        two_sizes = cast(Any, network.config).addition_embed_type == "text_time"
        name = (_original(module, network) if two_sizes else None) or module
        return _KOHYA[part] + name.replace(".", "_")
    prefix = _KOHYA[part] if "text_encoder_2" in networks else "lora_te_"
    if part == "text_encoder_2" and module == "text_projection":
        return prefix + module
    return prefix + ("text_model." + module.removeprefix("text_model.")).replace(".", "_")
