"""A LoRA in training: its factors beside a network's layers, their parameters, and the adapter that they make.

PEFT computes it. Factor A is random and B is zero, so that the network is unchanged at first (Hu et al. 2021, 4.1).
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
_ATTENTION = re.compile(
    r"(.*\.)?(attn\d?|attention)\.(to_(q|k|v|out\.0|add_out|qkv_mlp_proj)|add_(q|k|v)_proj)"  # of backbones
    r"|(.*\.)?single_transformer_blocks\.\d+\.attn\.to_out"
    r"|(.*\.)?self_attn\.(q|k|v|out)_proj"  # of CLIP
)
_CONVOLUTION = re.compile(r".*\.(conv1|conv2|conv_shortcut|(down|up)samplers\.\d+\.conv)")


@dataclass(frozen=True)
class Factors:
    """The factors of every layer: see PEFT's LoraConfig."""

    rank: int
    alpha: float
    rslora: bool = False
    dora: bool = False
    convolutions: bool = False


def attach_factors(networks: Networks, factors: Factors) -> None:
    """Attach new factors to the layers of these networks and freeze the networks' own weights.

    The factors are float32 and come from torch's global generator: seed it first. Raises ConfigError for a network
    without a layer that an adapter could change.
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
    """The parameters of the factors, by part, layer and name."""
    return {
        f"{part}.{name}": parameter
        for part, network in networks.items()
        for name, parameter in network.named_parameters()
        if f".{NAME}" in name
    }


def parameter_module(parameters: Mapping[str, nn.Parameter]) -> nn.ParameterDict:
    """A module that holds the same parameter objects. Dots in names become slashes, because modules refuse dots."""
    return nn.ParameterDict({name.replace(".", "/"): parameter for name, parameter in parameters.items()})


def as_adapter(networks: Networks) -> Adapter:
    """The trained factors as the adapter that `read_adapter` would return."""
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
