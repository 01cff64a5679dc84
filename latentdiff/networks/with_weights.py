"""A network of diffusers or transformers with given weights; no random ones are drawn before."""

from __future__ import annotations

from typing import Any

from accelerate import init_empty_weights
from torch import Tensor

from latentdiff.networks.blocks import with_blocks_of


def with_weights(network: Any, config: dict[str, Any], state: dict[str, Tensor]) -> Any:
    """A network of this class and config with exactly these weights, some of which may be in blocks.

    Buffers are computed as usual. Layers that share a weight need it once. Raises RuntimeError for
    weights of other shapes, ValueError for missing and for further ones.
    """
    with init_empty_weights(include_buffers=False):
        of_diffusers = hasattr(network, "from_config")
        model = network.from_config(config) if of_diffusers else network(network.config_class.from_dict(config))
    report = model.load_state_dict(with_blocks_of(model, state), strict=False, assign=True)
    if not of_diffusers:
        model.tie_weights()
    if absent := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise ValueError(f"{len(absent)} weights are missing, the first is {absent[0]}")
    if more := report.unexpected_keys:
        raise ValueError(f"{len(more)} weights belong to no layer, the first is {more[0]}")
    return model
