"""Networks that stay in the CPU's memory and compute on another device, by accelerate's and diffusers' hooks."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from latentdiff.core.errors import ConfigError
from latentdiff.model import Model, TorchPlace
from latentdiff.networks.by_blocks import offload_by_blocks
from latentdiff.runtime.device import usable_device

_HOOKS = ("_hf_hook", "_diffusers_hook")  # accelerate's, diffusers'
Unit = Literal["network", "block", "layer"]


def offloaded(model: Model, device: str | torch.device, unit: Unit = "network") -> Model:
    """A model whose networks move to `device` to compute, and back when the next unit computes.

    network: the least waiting. block: the backbone's repeated blocks, one at a time, the other networks layer by layer;
    on CUDA the next one moves while this one computes, so that two are there at once. layer: each layer by itself,
    which is the slowest and takes the least memory. Networks follow one another as in drawing: encoder, backbone,
    codec. Raises ConfigError if the device cannot compute.
    """
    from accelerate import cpu_offload, cpu_offload_with_hook

    place = usable_device(device)
    if any(hasattr(module, name) for part, _ in networks_in(model) for module in part.modules() for name in _HOOKS):
        raise ConfigError("the networks are offloaded already. Load the model again to offload them otherwise")
    hook = None
    for module, is_backbone in networks_in(model):
        if unit == "block":
            offload_by_blocks(module, place, layers=not is_backbone)
        elif unit == "layer":
            cpu_offload(module, place)  # buffers stay on the device: a codec may read them itself
        else:
            _, hook = cpu_offload_with_hook(module, place, hook)
    return replace(model, place=TorchPlace(place))


def networks_in(model: Model) -> list[tuple[nn.Module, bool]]:
    """The libraries' own modules, which are the ones that get called, in the order of drawing; and whether each is the
    backbone's.
    """
    backbone, encoder, codec = model.modules()
    own = {part: set(network.modules()) for part, network in (("backbone", backbone), ("codec", codec))}
    modules = [part for part in model.parts.values() if isinstance(part, nn.Module)]
    modules = modules or [child for network in (encoder, backbone, codec) for child in network.children()]
    order = {id(module): (module in own["backbone"], module in own["codec"]) for module in modules}
    modules.sort(key=lambda module: (order[id(module)][1], order[id(module)][0]))
    return [(module, order[id(module)][0]) for module in modules]
