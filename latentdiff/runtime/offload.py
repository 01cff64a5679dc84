"""Networks that lie in the CPU's memory and compute elsewhere, by accelerate's hooks."""

from __future__ import annotations

import torch
from torch import nn

from latentdiff.runtime.device import usable_device


def offload(
    text_encoder: nn.Module, unet: nn.Module, autoencoder: nn.Module, device: str | torch.device, *, layers: bool
) -> torch.device:
    """Move each network to `device` when it computes, and back when the next one does; with `layers` each layer.

    The order is that of drawing: the text encoder gives way to the U-Net, the U-Net to the autoencoder. Returns the
    device. Raises ConfigError where that cannot compute.
    """
    from accelerate import cpu_offload, cpu_offload_with_hook

    place = usable_device(device)
    modules = [child for network in (text_encoder, unet, autoencoder) for child in networks_in(network)]
    hook = None
    for module in modules:
        if layers:
            cpu_offload(module, place, offload_buffers=True)
        else:
            _, hook = cpu_offload_with_hook(module, place, hook)
    return place


def networks_in(adapter: nn.Module) -> list[nn.Module]:
    """The libraries' own modules within an adapter of ours; they are what is called."""
    from latentdiff.networks.encoders.two_clips import DualTextEncoder

    if isinstance(adapter, DualTextEncoder):
        return [adapter.first.model, adapter.second.model]
    return list(adapter.children())
