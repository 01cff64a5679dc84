"""A network whose blocks move to the device one by one, by diffusers' hooks."""

from __future__ import annotations

import torch
from diffusers.hooks import apply_group_offloading
from torch import nn


def offload_by_blocks(module: nn.Module, place: torch.device, *, layers: bool) -> None:
    """Move the module's repeated blocks, or with `layers` each layer, to `place` when it computes, and back afterwards.

    On CUDA the next one moves while this one computes.
    """
    level = "leaf_level" if layers else "block_level"
    apply_group_offloading(module, place, offload_type=level, num_blocks_per_group=1, use_stream=place.type == "cuda")
