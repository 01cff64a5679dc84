"""Networks written to folders in diffusers' layout, readable by others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers.gguf.utils import GGUFParameter
from torch import Tensor

from latentdiff.core.files import let_others_read
from latentdiff.networks.blocks import is_in_blocks, state_of
from latentdiff.networks.quiet import quietly

GGUF = "model.gguf"  # see formats/folder.py


def save_network(network: Any, directory: Path) -> None:
    """Write config.json and safetensors weights, or a GGUF file if some are in blocks.

    The config does not contain the path that the network came from.
    """
    with quietly():
        if is_in_blocks(network):
            directory.mkdir(parents=True, exist_ok=True)
            _save_config(network, directory)
            save_gguf(state_of(network), directory / GGUF, type(network).__name__)
        else:
            network.save_pretrained(directory, safe_serialization=True)
    let_others_read(directory)
    config = directory / "config.json"
    tree = json.loads(config.read_text(encoding="utf-8"))
    kept = {key: value for key, value in tree.items() if key != "_name_or_path"}
    config.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _save_config(network: Any, directory: Path) -> None:
    """Write config.json as the library does."""
    if hasattr(network, "save_config"):  # diffusers
        network.save_config(directory)
    else:
        network.config.save_pretrained(directory)


def save_gguf(state: Mapping[str, Tensor], file: Path, architecture: str) -> None:
    """Write a GGUF file; weights that are not in blocks keep their precision."""
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(file, architecture)
    for name, tensor in state.items():
        if isinstance(tensor, GGUFParameter):
            writer.add_tensor(name, tensor.as_tensor().cpu().numpy(), raw_dtype=tensor.quant_type)
        elif tensor.dtype == torch.bfloat16:
            bits = tensor.cpu().contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, bits, raw_dtype=GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, tensor.cpu().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
