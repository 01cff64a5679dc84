"""The order of a network's weights in memory, which changes its speed and the last bits of its results."""

from __future__ import annotations

import torch
from torch import nn


def lay_out(module: nn.Module, order: torch.memory_format = torch.channels_last) -> None:
    """Order the weights of two-dimensional convolutions: their results follow them. Others (of video) stay."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            part.to(memory_format=order)
