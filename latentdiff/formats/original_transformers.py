"""The original names of the layers of transformers, by diffusers' class and names: for adapters of other trainers.

Originals often have one layer where diffusers has several: queries, keys and values, one below the other. Layers whose
halves diffusers stores in the other order have no name here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple


class Original(NamedTuple):
    """A layer's original name, and its place among the layers that are one there; 0 if it is one by itself."""

    name: str
    place: int = 0


_ORDER = {"q": 0, "k": 1, "v": 2, "proj_mlp": 3}
_BLOCK, _SINGLE = r"transformer_blocks\.(\d+)\.", r"single_transformer_blocks\.(\d+)\."

_ATTENTION_OF_FLUX = {
    _BLOCK + r"attn\.to_([qkv])": r"double_blocks.\1.img_attn.qkv",
    _BLOCK + r"attn\.add_([qkv])_proj": r"double_blocks.\1.txt_attn.qkv",
    _BLOCK + r"attn\.to_out\.0": r"double_blocks.\1.img_attn.proj",
    _BLOCK + r"attn\.to_add_out": r"double_blocks.\1.txt_attn.proj",
}
_TABLES: Mapping[str, Mapping[str, str]] = {
    "FluxTransformer2DModel": {
        **_ATTENTION_OF_FLUX,
        _BLOCK + r"norm1\.linear": r"double_blocks.\1.img_mod.lin",
        _BLOCK + r"norm1_context\.linear": r"double_blocks.\1.txt_mod.lin",
        _BLOCK + r"ff\.net\.0\.proj": r"double_blocks.\1.img_mlp.0",
        _BLOCK + r"ff\.net\.2": r"double_blocks.\1.img_mlp.2",
        _BLOCK + r"ff_context\.net\.0\.proj": r"double_blocks.\1.txt_mlp.0",
        _BLOCK + r"ff_context\.net\.2": r"double_blocks.\1.txt_mlp.2",
        _SINGLE + r"attn\.to_([qkv])": r"single_blocks.\1.linear1",
        _SINGLE + r"(proj_mlp)": r"single_blocks.\1.linear1",
        _SINGLE + r"proj_out": r"single_blocks.\1.linear2",
        _SINGLE + r"norm\.linear": r"single_blocks.\1.modulation.lin",
        r"x_embedder": "img_in",
        r"context_embedder": "txt_in",
        r"time_text_embed\.timestep_embedder\.linear_1": "time_in.in_layer",
        r"time_text_embed\.timestep_embedder\.linear_2": "time_in.out_layer",
        r"time_text_embed\.text_embedder\.linear_1": "vector_in.in_layer",
        r"time_text_embed\.text_embedder\.linear_2": "vector_in.out_layer",
        r"time_text_embed\.guidance_embedder\.linear_1": "guidance_in.in_layer",
        r"time_text_embed\.guidance_embedder\.linear_2": "guidance_in.out_layer",
        r"proj_out": "final_layer.linear",
    },
    "Flux2Transformer2DModel": {
        **_ATTENTION_OF_FLUX,
        _BLOCK + r"ff\.linear_in": r"double_blocks.\1.img_mlp.0",
        _BLOCK + r"ff\.linear_out": r"double_blocks.\1.img_mlp.2",
        _BLOCK + r"ff_context\.linear_in": r"double_blocks.\1.txt_mlp.0",
        _BLOCK + r"ff_context\.linear_out": r"double_blocks.\1.txt_mlp.2",
        _SINGLE + r"attn\.to_qkv_mlp_proj": r"single_blocks.\1.linear1",
        _SINGLE + r"attn\.to_out": r"single_blocks.\1.linear2",
        r"x_embedder": "img_in",
        r"context_embedder": "txt_in",
        r"time_guidance_embed\.timestep_embedder\.linear_1": "time_in.in_layer",
        r"time_guidance_embed\.timestep_embedder\.linear_2": "time_in.out_layer",
        r"(double_stream_modulation_img|double_stream_modulation_txt|single_stream_modulation)\.linear": r"\1.lin",
        r"proj_out": "final_layer.linear",
    },
    "SD3Transformer2DModel": {
        _BLOCK + r"(attn2?)\.to_([qkv])": r"joint_blocks.\1.x_block.\2.qkv",
        _BLOCK + r"attn\.add_([qkv])_proj": r"joint_blocks.\1.context_block.attn.qkv",
        _BLOCK + r"(attn2?)\.to_out\.0": r"joint_blocks.\1.x_block.\2.proj",
        _BLOCK + r"attn\.to_add_out": r"joint_blocks.\1.context_block.attn.proj",
        _BLOCK + r"norm1\.linear": r"joint_blocks.\1.x_block.adaLN_modulation.1",
        _BLOCK + r"ff\.net\.0\.proj": r"joint_blocks.\1.x_block.mlp.fc1",
        _BLOCK + r"ff\.net\.2": r"joint_blocks.\1.x_block.mlp.fc2",
        _BLOCK + r"ff_context\.net\.0\.proj": r"joint_blocks.\1.context_block.mlp.fc1",
        _BLOCK + r"ff_context\.net\.2": r"joint_blocks.\1.context_block.mlp.fc2",
        r"pos_embed\.proj": "x_embedder.proj",
        r"time_text_embed\.timestep_embedder\.linear_1": "t_embedder.mlp.0",
        r"time_text_embed\.timestep_embedder\.linear_2": "t_embedder.mlp.2",
        r"time_text_embed\.text_embedder\.linear_1": "y_embedder.mlp.0",
        r"time_text_embed\.text_embedder\.linear_2": "y_embedder.mlp.2",
        r"proj_out": "final_layer.linear",
    },
    "ZImageTransformer2DModel": {
        r"(\w+\.\d+\.attention)\.to_([qkv])": r"\1.qkv",
        r"(\w+\.\d+\.attention)\.to_out\.0": r"\1.out",
        r"all_x_embedder\.2-1": "x_embedder",
        r"all_final_layer\.2-1\.(.+)": r"final_layer.\1",
    },
}


def original(kind: str, module: str) -> Original | None:
    """The original of a layer of a transformer of this class of diffusers; None if it has no other name."""
    for pattern, name in _TABLES.get(kind, {}).items():
        if match := re.fullmatch(pattern, module):
            return Original(match.expand(name), _ORDER.get(str(match[match.lastindex or 0]), 0))
    return None
