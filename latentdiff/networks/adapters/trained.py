"""A LoRA that is being trained: put beside a network's layers, its parameters alone, and as the adapter it has become.

PEFT computes it. Factor A is drawn and B is zero, so that the network begins as it was (Hu et al. 2022, 4.1).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from latentdiff.core.errors import ConfigError
from latentdiff.networks.adapters.adapter import Adapter, Layer, Networks

NAME = "adapter_taught"
_ATTENTION = re.compile(r"(.*\.)?attn\d\.to_(q|k|v|out\.0)|(.*\.)?self_attn\.(q|k|v|out)_proj")
_CONVOLUTION = re.compile(r".*\.(conv1|conv2|conv_shortcut|(down|up)samplers\.\d+\.conv)")


@dataclass(frozen=True)
class Factors:
    """What is put beside each layer: see PEFT's LoraConfig."""

    rank: int
    alpha: float
    rslora: bool = False
    dora: bool = False
    convolutions: bool = False


def begin(networks: Networks, factors: Factors) -> None:
    """Put new factors beside the layers of these networks, whose own weights are frozen.

    They are drawn from torch's global generator: seed it. Factors are float32 whatever the weights are. Raises
    ConfigError where a network has nothing to put them beside.
    """
    for part, network in networks.items():
        network.requires_grad_(False)
        chosen = [name for name, layer in network.named_modules() if _is_chosen(name, layer, factors)]
        if not chosen:
            raise ConfigError(f"{part} has no attention that an adapter could change")
        config = LoraConfig(
            r=factors.rank,
            lora_alpha=factors.alpha,  # type: ignore[arg-type]  # any number does
            target_modules=f"({'|'.join(map(re.escape, chosen))})",
            use_rslora=factors.rslora,
            use_dora=factors.dora,
        )
        inject_adapter_in_model(config, network, adapter_name=NAME)
    for parameter in parameters_of(networks).values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)


def _is_chosen(name: str, layer: nn.Module, factors: Factors) -> bool:
    if isinstance(layer, nn.Linear):
        return _ATTENTION.fullmatch(name) is not None
    return factors.convolutions and isinstance(layer, nn.Conv2d) and _CONVOLUTION.fullmatch(name) is not None


def parameters_of(networks: Networks) -> dict[str, nn.Parameter]:
    """The factors alone, by part, layer and name."""
    return {
        f"{part}.{name}": parameter
        for part, network in networks.items()
        for name, parameter in network.named_parameters()
        if f".{NAME}" in name
    }


def alone(parameters: Mapping[str, nn.Parameter]) -> nn.ParameterDict:
    """Some of a network's parameters as a module of their own, the same objects; names in it may hold no dots."""
    return nn.ParameterDict({name.replace(".", "/"): parameter for name, parameter in parameters.items()})


def taken(networks: Networks) -> Adapter:
    """What has been learnt, as it would be read from a file."""
    layers: dict[str, dict[str, Layer]] = {}
    for part, network in networks.items():
        for module, layer in network.named_modules():
            if isinstance(layer, LoraLayer) and NAME in layer.lora_A:
                layers.setdefault(part, {})[module] = _layer(layer)
    return Adapter(layers)


def _layer(layer: LoraLayer) -> Layer:
    kept: dict[str, Any] = {"lora_A.weight": layer.lora_A, "lora_B.weight": layer.lora_B}
    tensors = {name: modules[NAME].weight for name, modules in kept.items()}
    if NAME in layer.lora_magnitude_vector:
        vector: Any = layer.lora_magnitude_vector[NAME]
        tensors["lora_magnitude_vector"] = vector.weight
    factors = {name: tensor.detach().float().cpu().clone() for name, tensor in tensors.items()}
    return Layer(factors, float(layer.lora_alpha[NAME]), bool(layer.use_rslora[NAME]))
