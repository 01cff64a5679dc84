"""The names and shapes by which the transformers of single files are known, and the configs that follow from them.

Black Forest Labs' names for Flux, Stability AI's for Stable Diffusion 3, and those of ComfyUI for Z-Image and
Qwen-Image. The sizes of a head's rotary axes have a fixed proportion, which no file states.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]


def count(shapes: Shapes, group: str) -> int:
    """The number of blocks, whose names begin with group.0. and so on. Raises ValueError if one is missing."""
    numbers = {int(match[1]) for name in shapes if (match := re.match(rf"{re.escape(group)}\.(\d+)\.", name))}
    if numbers and max(numbers) != len(numbers) - 1:
        raise ValueError(f"{group} are numbered up to {max(numbers)}, but there are only {len(numbers)}")
    return len(numbers)


def axes(head: int, *eighths: float) -> tuple[int, ...]:
    """The sizes of a head's rotary axes, given in eighths of the head."""
    return tuple(int(head * share // 8) for share in eighths)


def stable_diffusion_3(shapes: Shapes) -> dict[str, Any] | None:
    """The config of diffusers.SD3Transformer2DModel, or None."""
    if "joint_blocks.0.x_block.attn.qkv.weight" not in shapes:
        return None
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    blocks = count(shapes, "joint_blocks")
    dual = tuple(n for n in range(blocks) if f"joint_blocks.{n}.x_block.attn2.qkv.weight" in shapes)
    head = 64
    return {
        "sample_size": 128,
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": shapes["final_layer.linear.weight"][0] // patch**2,
        "num_layers": blocks,
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "caption_projection_dim": width,
        "pooled_projection_dim": shapes["y_embedder.mlp.0.weight"][1],
        "pos_embed_max_size": math.isqrt(shapes["pos_embed"][1]),
        "dual_attention_layers": dual,
        "qk_norm": "rms_norm" if "joint_blocks.0.x_block.attn.ln_q.weight" in shapes else None,
    }


def flux(shapes: Shapes) -> dict[str, Any] | None:
    """The config of diffusers.FluxTransformer2DModel, or None."""
    if "vector_in.in_layer.weight" not in shapes or "double_blocks.0.img_attn.qkv.weight" not in shapes:
        return None
    width, inputs = shapes["img_in.weight"]
    (head,) = shapes["double_blocks.0.img_attn.norm.query_norm.scale"]
    return {
        "in_channels": inputs,
        "out_channels": shapes["final_layer.linear.weight"][0],
        "num_layers": count(shapes, "double_blocks"),
        "num_single_layers": count(shapes, "single_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
        "axes_dims_rope": axes(head, 1, 3.5, 3.5),
    }


def flux_2(shapes: Shapes) -> dict[str, Any] | None:
    """The config of diffusers.Flux2Transformer2DModel, or None."""
    if "double_stream_modulation_img.lin.weight" not in shapes:
        return None
    width, inputs = shapes["img_in.weight"]
    (head,) = shapes["double_blocks.0.img_attn.norm.query_norm.scale"]
    return {
        "in_channels": inputs,
        "num_layers": count(shapes, "double_blocks"),
        "num_single_layers": count(shapes, "single_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "timestep_guidance_channels": shapes["time_in.in_layer.weight"][1],
        "mlp_ratio": shapes["double_blocks.0.img_mlp.2.weight"][1] / width,
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
        "axes_dims_rope": axes(head, 2, 2, 2, 2),
    }


def _either(shapes: Shapes, name: str, other: str) -> tuple[int, ...]:
    """The shape under one of two names; the error for a missing one states the first."""
    return shapes[other if other in shapes else name]


def z_image(shapes: Shapes) -> dict[str, Any] | None:
    """The config of diffusers.ZImageTransformer2DModel, or None. x_pad_token tells it from Lumina 2."""
    if "x_pad_token" not in shapes or "cap_embedder.1.weight" not in shapes:
        return None
    width, inputs = _either(shapes, "x_embedder.weight", "all_x_embedder.2-1.weight")
    (head,) = _either(shapes, "layers.0.attention.q_norm.weight", "layers.0.attention.norm_q.weight")
    return {
        "in_channels": inputs // 4,
        "dim": width,
        "n_layers": count(shapes, "layers"),
        "n_refiner_layers": count(shapes, "noise_refiner"),
        "n_heads": width // head,
        "n_kv_heads": width // head,
        "cap_feat_dim": shapes["cap_embedder.1.weight"][1],
        "axes_dims": list(axes(head, 2, 3, 3)),
        "axes_lens": [1536, 512, 512],
    }


def qwen_image(shapes: Shapes) -> dict[str, Any] | None:
    """The config of diffusers.QwenImageTransformer2DModel, or None."""
    if "transformer_blocks.0.img_mod.1.weight" not in shapes or "txt_norm.weight" not in shapes:
        return None
    width, inputs = shapes["img_in.weight"]
    (head,) = shapes["transformer_blocks.0.attn.norm_q.weight"]
    return {
        "in_channels": inputs,
        "out_channels": shapes["proj_out.weight"][0] // 4,
        "num_layers": count(shapes, "transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["txt_norm.weight"][0],
        "axes_dims_rope": axes(head, 1, 3.5, 3.5),
    }
