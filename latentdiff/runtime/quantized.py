"""Weights of 8 or 4 bits in place of 32 or 16: a model that takes less memory and draws nearly the same picture.

    int8    torchao: a scale for each output
    fp8     torchao: float8 (e4m3), a scale for each output
    q8_0    GGUF: blocks of 32 weights of 8 bits, a scale each
    q4_0    GGUF: blocks of 32 weights of 4 bits, a scale each

Linear layers inside the repeated blocks of the backbone and of the text encoders are quantized; convolutions, the first
and last layers and the VAE are not. Activations keep the model's precision: a layer widens its weights when it
computes, so on a CPU the gain is memory, not time. OpenVINO's graphs have kinds of their own: see compressed.py.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

from torch import nn

from latentdiff.core.errors import ConfigError
from latentdiff.model import Model
from latentdiff.networks.blocks import TYPES, is_in_blocks, put_in_blocks, repeated_layers
from latentdiff.runtime.kinds import check_kind


def quantized(model: Model, kind: str) -> Model:
    """A torch model whose linear layers have weights of that kind; its modules are changed in place.

    Raises ConfigError for an unknown kind, for a model that is quantized already, and for one without such layers.
    """
    check_kind(kind, "torch")
    if model.quantized is not None:
        raise ConfigError(f"the model's weights are {model.quantized} already")
    if is_quantized(model):
        raise ConfigError("the weights in the model's files are quantized already")
    if not sum(_quantize(network, kind) for network in _networks(model)):
        raise ConfigError("no layer of this model can be quantized: none has rows of a multiple of 32 weights")
    return replace(model, quantized=kind)


def is_quantized(model: Model) -> bool:
    """Whether weights are quantized, since loading or in the model's files."""
    return model.quantized is not None or (model.runtime == "torch" and any(map(is_in_blocks, _networks(model))))


def _networks(model: Model) -> list[nn.Module]:
    return [part for name, part in model.parts.items() if isinstance(part, nn.Module) and name != "vae"]


def _quantize(network: nn.Module, kind: str) -> int:
    """Quantize the repeated linear layers in place; returns their number."""
    if kind in TYPES:
        return put_in_blocks(network, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at import torchao warns of its own use of torch
        try:
            from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
        except ImportError:
            raise ConfigError(f"{kind} requires torchao: pip install 'latentdiff[quantize]'") from None
        settings: Any = Int8WeightOnlyConfig(version=2) if kind == "int8" else Float8WeightOnlyConfig()
        layers = {id(layer) for _, layer in repeated_layers(network)}
        quantize_(network, settings, filter_fn=lambda module, name: id(module) in layers)
    return len(layers)
