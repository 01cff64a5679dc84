"""What an adapter adds to a layer's weight, for the kinds that are not computed beside the layer.

full    a difference of the whole weight, and of the bias
LoHa    (w1_a w1_b) * (w2_a w2_b), element by element (Hyeon-Woo et al. 2022)
LoKr    w1 (x) w2, Kronecker's product (Yeh et al. 2024)
DoRA    m (W + D) / |W + D| - W around any of them (Liu et al. 2024, equation 5); LyCORIS also takes the lengths of
inputs instead of outputs
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.loha import layer as loha
from peft.tuners.lokr import layer as lokr
from torch import Tensor, nn

from latentdiff.core.errors import ModelError, raised_as
from latentdiff.networks.adapters.adapter import Layer


def changes(layer: Layer, target: Any, name: str) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """The target's parameters and what is added to each at weight 1, float32.

    Raises ModelError for factors of another shape.
    """
    with raised_as(ModelError, f"the adapter belongs to another model: {name}"):
        numbers = _numbers(layer)
        if numbers not in (0, target.weight.numel()):  # before a product of any size is made
            raise ModelError(f"the adapter belongs to another model: {name} makes {numbers:,} numbers")
        if numbers:
            product = _product(layer).reshape(target.weight.shape).to(target.weight.device)
            if "dora_scale" in layer.factors:
                weight = target.weight.float()
                product = decomposed(weight, product, layer.factors["dora_scale"].to(weight)) - weight
            yield target.weight, product
        if "diff_b" in layer.factors:
            if target.bias is None:
                raise ModelError(f"the adapter belongs to another model: it changes the bias of {name}, which has none")
            yield target.bias, layer.factors["diff_b"].float().reshape(target.bias.shape)


def decomposed(weight: Tensor, change: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA's weight: W + D with each row, or column, scaled to a length of its own.

    magnitude: (out, 1, ...) or (1, in, ...), in the axes of the weight.
    """
    axes = [axis for axis in range(weight.ndim) if magnitude.shape[axis] == 1 or axis > 1]
    changed = weight + change
    length = torch.linalg.vector_norm(changed, dim=axes, keepdim=True)
    return changed * (magnitude / (length + torch.finfo(length.dtype).eps))


def _numbers(layer: Layer) -> int:
    """The number of values of the weight that the factors make; 0 for a difference of the bias alone."""
    shapes = {name: tensor.shape for name, tensor in layer.factors.items()}
    if layer.kind == "full":
        return shapes["diff"].numel() if "diff" in shapes else 0
    if layer.kind == "lora":
        return shapes["lora_A.weight"][1:].numel() * shapes["lora_B.weight"][0]
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
    if layer.kind == "full":
        return factors["diff"]
    if layer.kind == "lora":
        return layer.scale * (factors["lora_B.weight"].flatten(1) @ factors["lora_A.weight"].flatten(1))
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
