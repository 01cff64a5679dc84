"""Adapters on networks: several at once, each with its weight, beside the layers or added to their weights.

PEFT's layers carry LoRA and DoRA; the other kinds can only be added to the weights (changes.py).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from itertools import chain
from typing import Any, cast

import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn

from latentdiff.core.errors import ModelError
from latentdiff.networks.adapters.adapter import Adapter, Layer, Networks
from latentdiff.networks.adapters.changes import changes, decomposed
from latentdiff.networks.blocks import holds_numbers

_PREFIX = "adapter_"  # PEFT stores adapters as attributes; "half" or "to" would hide a method


def attach(adapter: Adapter, networks: Networks, name: str, weight: float = 1.0) -> None:
    """Attach an adapter beside the layers that it changes. name: letters, digits and underscores.

    Raises ModelError for a kind that can only be added to the weights.
    """
    name = _PREFIX + name
    if not all(layer.carried for layers in adapter.layers.values() for layer in layers.values()):
        raise ModelError("LoHa, LoKr, full differences and DoRA of inputs require fuse=True: they change the weights")
    others = weights_of(networks)  # PEFT makes the new one the only active one
    for part, layers in adapter.layers.items():
        _inject(layers, networks[part], name)
    weigh(networks, {**others, name.removeprefix(_PREFIX): weight})


def _inject(layers: Mapping[str, Layer], network: nn.Module, name: str) -> None:
    dora = any("lora_magnitude_vector" in layer.factors for layer in layers.values())
    if dora:
        layers = {module: _unscaled(layer) for module, layer in layers.items()}
    ranks = {re.escape(module): layer.rank for module, layer in layers.items()}
    config = LoraConfig(
        r=next(iter(ranks.values())),
        lora_alpha=1,
        target_modules="|".join(ranks),  # as a pattern, names must match in full
        rank_pattern={f"^{module}": rank for module, rank in ranks.items()},
        # a float as PEFT's alpha; it divides by the rank
        alpha_pattern={f"^{re.escape(module)}": layer.scale * layer.rank for module, layer in layers.items()},
        use_dora=dora,
        lora_bias=any("lora_B.bias" in layer.factors for layer in layers.values()),
    )
    state = {f"{module}.{factor}": t for module, layer in layers.items() for factor, t in layer.factors.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several at once are meant
        warnings.filterwarnings("ignore", "TorchaoLoraLinear was instantiated")  # quantized layers are never merged
        # made empty: nothing is drawn from a global generator
        inject_adapter_in_model(config, network, adapter_name=name, low_cpu_mem_usage=True)
    loaded: Any = set_peft_model_state_dict(network, state, name, low_cpu_mem_usage=True)
    if loaded.unexpected_keys:
        raise ModelError(f"adapter {name}: no place for {loaded.unexpected_keys[0]}")
    if dora:
        for carrier in _carriers({"": network}):
            if name in carrier.lora_variant:
                carrier.lora_variant[name] = WeightedDora
    first = next(network.parameters())
    nn.Module.to(network, device=first.device, dtype=first.dtype)  # diffusers' own warns of every cast


def _unscaled(layer: Layer) -> Layer:
    """The same layer with alpha / rank in its second factor: what is left to scale is the adapter's weight."""
    factors = {**layer.factors, "lora_B.weight": layer.factors["lora_B.weight"] * layer.scale}
    if "lora_B.bias" in factors:
        factors["lora_B.bias"] = factors["lora_B.bias"] * layer.scale
    return Layer(factors, alpha=float(layer.rank))


class WeightedDora(LoraVariant):
    """DoRA whose weight scales all that it changes: W' = W + weight (m (W + B A) / |W + B A| - W).

    PEFT's own scales B A alone: at weight 0 it would still change the layer, by m / |W|.
    """

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """The output of the layer with what the adapter adds to it."""
        added = module.lora_magnitude_vector[active_adapter](
            x,
            lora_A=module.lora_A[active_adapter],
            lora_B=module.lora_B[active_adapter],
            scaling=1.0,
            base_layer=module.get_base_layer(),
            base_result=result if len(module.active_adapters) == 1 else None,
        )
        return cast(Tensor, result + module.scaling[active_adapter] * added)


def _dora_change(module: Any, name: str) -> Tensor:
    """What a DoRA adds to its layer's weight, into which no other adapter may be merged."""
    weight, vector = module.get_base_layer().weight, module.lora_magnitude_vector[name]
    product = vector.get_lora_weight(module.lora_A[name], module.lora_B[name]).reshape(weight.shape)
    magnitude = vector.weight[:, None] if weight.ndim == 2 else vector.weight.transpose(0, 1)
    return cast(Tensor, module.scaling[name] * (decomposed(weight.float(), product.float(), magnitude) - weight))


def _carriers(networks: Networks) -> list[Any]:
    modules = chain.from_iterable(network.modules() for network in networks.values())
    return [module for module in modules if isinstance(module, LoraLayer)]


def weights_of(networks: Networks) -> dict[str, float]:
    """The active adapters and their weights."""
    weights: dict[str, float] = {}
    for carrier in _carriers(networks):
        for name in carrier.active_adapters:
            if name in carrier.scaling and carrier.lora_alpha[name]:
                weights[name.removeprefix(_PREFIX)] = carrier.scaling[name] * carrier.r[name] / carrier.lora_alpha[name]
    return weights


def weigh(networks: Networks, weights: Mapping[str, float]) -> None:
    """Make these adapters active, with these weights. Raises ModelError for a name that is not attached."""
    carriers = _carriers(networks)
    known = {name.removeprefix(_PREFIX) for carrier in carriers for name in carrier.lora_A}
    if unknown := weights.keys() - known:
        raise ModelError(f"no adapter {sorted(unknown)[0]!r} is loaded; there are {', '.join(sorted(known)) or 'none'}")
    for carrier in carriers:
        carrier.set_adapter([_PREFIX + name for name in weights if _PREFIX + name in carrier.lora_A])
        for name, weight in weights.items():
            carrier.set_scale(_PREFIX + name, weight)
        carrier.requires_grad_(False)


@torch.no_grad()
def merge_attached(networks: Networks) -> None:
    """Add the active adapters to the network's weights, each times its own weight, and detach all adapters.

    Raises ModelError for quantized weights.
    """
    check_numbers(networks)
    for carrier in _carriers(networks):
        weight = carrier.get_base_layer().weight
        doras = [name for name in carrier.active_adapters if name in carrier.lora_variant]
        changed = [_dora_change(carrier, name) for name in doras]
        carrier.merge(adapter_names=[name for name in carrier.active_adapters if name not in doras])
        for change in changed:
            weight.data = (weight.float() + change).to(weight.dtype)
    detach(networks)


def check_numbers(networks: Networks) -> None:
    """Raises ModelError for quantized weights, whose rounding would lose the change."""
    if not all(map(holds_numbers, networks.values())):
        raise ModelError("an adapter cannot be added to quantized weights: load it beside them, without fuse")


def detach(networks: Networks) -> None:
    """Detach every adapter. Merged ones stay in the weights."""
    for network in networks.values():
        for name, module in list(network.named_modules()):
            if isinstance(module, LoraLayer):
                parent, _, child = name.rpartition(".")
                setattr(network.get_submodule(parent), child, module.get_base_layer())
        if hasattr(network, "peft_config"):
            del network.peft_config


@torch.no_grad()
def merge(adapter: Adapter, networks: Networks, weight: float = 1.0) -> None:
    """Add an adapter of any kind to the weights. Raises ModelError while others are attached."""
    check_numbers(networks)
    if _carriers(networks):
        raise ModelError("adapters are attached: merge or unload them before another is merged")
    carried: dict[str, dict[str, Layer]] = {}
    added: list[tuple[Any, Tensor]] = []  # all of it computed before any weight is changed
    for part, layers in adapter.layers.items():
        for module, layer in layers.items():
            if layer.carried:
                carried.setdefault(part, {})[module] = layer
            else:
                target = networks[part].get_submodule(module)
                added += [(p, weight * c) for p, c in changes(layer, target, f"{part}.{module}")]
    for parameter, change in added:
        parameter.data = (parameter.float() + change.to(parameter.device)).to(parameter.dtype)
    if carried:
        attach(Adapter(carried), networks, "merging", weight)
        merge_attached(networks)
