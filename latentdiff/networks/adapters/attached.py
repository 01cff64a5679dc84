"""Adapters on networks: several at once, each with its weight, beside the layers or added to their weights.

PEFT's layers carry LoRA and DoRA; LoHa and LoKr are added to the weights by PEFT's formulas.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.loha import layer as loha
from peft.tuners.lokr import layer as lokr
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from latentdiff.core.errors import ModelError, raised_as
from latentdiff.networks.adapters.adapter import Adapter, Layer, Networks

_PREFIX = "adapter_"  # PEFT stores adapters as attributes; "half" or "to" would hide a method


def attach(adapter: Adapter, networks: Networks, name: str, weight: float = 1.0) -> None:
    """Attach an adapter beside the layers that it changes. Its name is of letters, digits and underscores."""
    name = _PREFIX + name
    if any(layer.kind != "lora" for layers in adapter.layers.values() for layer in layers.values()):
        raise ModelError("LoHa and LoKr require fuse=True: they can only be added to the weights")
    for part, layers in adapter.layers.items():
        _inject(layers, networks[part], name)
    weigh(networks, {**weights_of(networks), name.removeprefix(_PREFIX): weight})


def _inject(layers: Mapping[str, Layer], network: nn.Module, name: str) -> None:
    ranks = {re.escape(module): layer.rank for module, layer in layers.items()}
    config = LoraConfig(
        r=next(iter(ranks.values())),
        lora_alpha=1,
        target_modules="|".join(ranks),  # as a pattern the names are whole ones
        rank_pattern={f"^{module}": rank for module, rank in ranks.items()},
        # a float as PEFT's alpha; it divides by the rank
        alpha_pattern={f"^{re.escape(module)}": layer.scale * layer.rank for module, layer in layers.items()},
        use_dora=any("lora_magnitude_vector" in layer.factors for layer in layers.values()),
        lora_bias=any("lora_B.bias" in layer.factors for layer in layers.values()),
    )
    state = {f"{module}.{factor}": t for module, layer in layers.items() for factor, t in layer.factors.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several at once are meant
        # made empty: nothing is drawn from a global generator
        inject_adapter_in_model(config, network, adapter_name=name, low_cpu_mem_usage=True)
    loaded: Any = set_peft_model_state_dict(network, state, name, low_cpu_mem_usage=True)
    if loaded.unexpected_keys:
        raise ModelError(f"adapter {name}: no place for {loaded.unexpected_keys[0]}")
    first = next(network.parameters())
    nn.Module.to(network, device=first.device, dtype=first.dtype)  # diffusers' own warns of every cast


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


def merge_attached(networks: Networks) -> None:
    """Add the active adapters to the network's weights, each times its own weight, and detach all adapters."""
    for carrier in _carriers(networks):
        carrier.merge()
    detach(networks)


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
    if _carriers(networks):
        raise ModelError("adapters are attached: merge or unload them before another is merged")
    plain: dict[str, dict[str, Layer]] = {}
    added: list[tuple[Any, Tensor]] = []  # all of it computed before any weight is changed
    for part, layers in adapter.layers.items():
        for module, layer in layers.items():
            if layer.kind == "lora":
                plain.setdefault(part, {})[module] = layer
            else:
                target: Any = networks[part].get_submodule(module)
                added.append((target, weight * _delta(layer, f"{part}.{module}", target.weight.shape)))
    for target, delta in added:
        target.weight.data = (target.weight.float() + delta.to(target.weight.device)).to(target.weight.dtype)
    if plain:
        attach(Adapter(plain), networks, "merging", weight)
        merge_attached(networks)


def _delta(layer: Layer, name: str, shape: torch.Size) -> Tensor:
    """What LoHa (Hyeon-Woo et al. 2022) and LoKr (Yeh et al. 2024) add to a weight, by PEFT's own arithmetic.

    Raises ModelError for factors of another shape.
    """
    with raised_as(ModelError, f"the adapter belongs to another model: {name}"):
        if _numbers(layer) != shape.numel():  # before a product of any size is made
            raise ModelError(f"the adapter belongs to another model: {name} makes {_numbers(layer):,} numbers")
        return _product(layer).reshape(shape)


def _numbers(layer: Layer) -> int:
    """The number of values of the weight that LoHa's or LoKr's factors make."""
    shapes = {name: tensor.shape for name, tensor in layer.factors.items()}
    if layer.kind == "loha":
        core = shapes["hada_t1"][2:].numel() if "hada_t1" in shapes else 1
        outer = shapes["hada_w1_a"][-1 if "hada_t1" in shapes else 0]
        return outer * shapes["hada_w1_b"][1] * core
    weights = 1
    for name in ("lokr_w1", "lokr_w2"):
        core = shapes["lokr_t2"][2:].numel() if name == "lokr_w2" and "lokr_t2" in shapes else 1
        first = shapes.get(f"{name}_a", torch.Size())
        outer = first[-1 if core > 1 else 0] if first else 0
        weights *= shapes[name].numel() if name in shapes else outer * shapes[f"{name}_b"][1] * core
    return weights


def _product(layer: Layer) -> Tensor:
    factors = {name: tensor.float() for name, tensor in layer.factors.items()}
    make: Any = loha if layer.kind == "loha" else lokr
    if layer.kind == "lokr":
        full = "lokr_w1" in factors and "lokr_w2" in factors  # LyCORIS: without low rank there is no alpha / rank
        w1, w2 = _kronecker_factor(factors, "w1"), _kronecker_factor(factors, "w2")
        return make.make_kron(w1, w2, 1.0 if full else layer.scale)
    w1_a, w1_b, w2_a, w2_b = (factors[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
    scale = torch.tensor(layer.scale)
    if "hada_t1" in factors:
        return make.make_weight_cp(factors["hada_t1"], w1_a, w1_b, factors["hada_t2"], w2_a, w2_b, scale)
    return make.make_weight(w1_a, w1_b, w2_a, w2_b, scale)


def _kronecker_factor(factors: dict[str, Tensor], name: str) -> Tensor:
    make: Any = lokr
    if f"lokr_{name}" in factors:
        return factors[f"lokr_{name}"]
    a, b = factors[f"lokr_{name}_a"], factors[f"lokr_{name}_b"]
    if "lokr_t2" in factors and name == "w2":
        return make.make_weight_cp(factors["lokr_t2"], a, b)
    return a @ b
