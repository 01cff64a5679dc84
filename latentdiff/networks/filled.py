"""A network of diffusers' filled with given weights, which no random ones are drawn for."""

from __future__ import annotations

from typing import Any

from accelerate import init_empty_weights
from torch import Tensor


def filled(network: Any, config: dict[str, Any], state: dict[str, Tensor]) -> Any:
    """A network of this class and config with exactly these weights. Tables that it computes itself are computed."""
    with init_empty_weights(include_buffers=False):
        model = network.from_config(config)
    model.load_state_dict(state, assign=True)
    return model
