"""Networks that stay in the CPU's memory and compute on another device, by accelerate's hooks."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from latentdiff.model import Model, TorchPlace
from latentdiff.runtime.device import usable_device


def offloaded(model: Model, device: str | torch.device, *, layers: bool) -> Model:
    """A model whose networks move to `device` to compute, and back when the next network computes.

    layers: move each layer by itself, which is slower and takes the least memory. Networks follow one another as in
    drawing: encoder, backbone, codec. Raises ConfigError if the device cannot compute.
    """
    from accelerate import cpu_offload, cpu_offload_with_hook

    place = usable_device(device)
    backbone, encoder, codec = model.modules()
    hook = None
    for module in [child for network in (encoder, backbone, codec) for child in networks_in(network)]:
        if layers:
            cpu_offload(module, place, offload_buffers=True)
        else:
            _, hook = cpu_offload_with_hook(module, place, hook)
    return replace(model, place=TorchPlace(place))


def networks_in(adapter: nn.Module) -> list[nn.Module]:
    """The libraries' own modules inside our network, which are the ones that get called."""
    encoders = getattr(adapter, "encoders", None)
    return [encoder.model for encoder in encoders] if encoders else list(adapter.children())
