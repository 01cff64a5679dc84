"""Linear layers whose weights stay in blocks of small integers with a scale each, as GGUF files store them.

A block of Q8_0 has 32 bytes and a float16 scale: 8.5 bits a weight. One of Q4_0 has 32 half bytes and a scale: 4.5
bits. A layer computes in the precision of its input: each call widens its weights, uses them and forgets them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor
from torch import Tensor, nn

BLOCK = 32  # numbers in a block of the types that are written here
TYPES = ("q8_0", "q4_0")


class BlockLinear(nn.Linear):
    """x (..., inputs) -> (..., outputs). `weight` returns numbers in the layer's precision.

    So libraries that look at a weight's precision or shape, or put an adapter beside the layer, see a usual layer.
    """

    def __init__(self, layer: nn.Linear, weight: GGUFParameter):
        """A layer of the sizes and with the bias of another, whose weight is in blocks."""
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.kind = layer.in_features, layer.out_features, weight.quant_type
        self.blocks = nn.Parameter(weight.as_tensor(), requires_grad=False)
        self.register_parameter("bias", layer.bias)
        precision = weight.new_empty(0, dtype=layer.weight.dtype)
        self.precision: Tensor
        self.register_buffer("precision", precision.as_subclass(Tensor), persistent=False)  # moves with the layer

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The numbers (outputs, inputs), widened anew."""
        return dequantized(GGUFParameter(self.blocks, quant_type=self.kind)).to(self.precision.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """See the class."""
        weight = dequantized(GGUFParameter(self.blocks, quant_type=self.kind))
        return nn.functional.linear(input, weight.to(input.dtype), self.bias)


def repeated_layers(network: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers inside the numbered blocks of a network, which are nearly all of a transformer's weights.

    The first and the last layers, and those that read times and guidance, are few and sensitive: they are left out.
    """
    for name, module in network.named_modules():
        numbered = any(word.isdigit() for word in name.split(".")[:-1])
        if isinstance(module, nn.Linear) and numbered and module.in_features % BLOCK == 0:
            yield name, module


def in_blocks(weight: Tensor, kind: str) -> GGUFParameter:
    """A weight (outputs, inputs) in blocks of that type; the nearest numbers that blocks can hold are taken."""
    import gguf

    chosen = gguf.GGMLQuantizationType[kind.upper()]
    rows = gguf.quants.quantize(weight.detach().float().cpu().numpy(), chosen)
    return GGUFParameter(torch.from_numpy(rows), quant_type=chosen)


def put_in_blocks(network: nn.Module, kind: str) -> int:
    """Replace the repeated linear layers in place; returns their number. kind: one of TYPES."""
    layers = [(name, layer) for name, layer in repeated_layers(network) if not isinstance(layer, BlockLinear)]
    for name, layer in layers:
        _replace(network, name, BlockLinear(layer, in_blocks(layer.weight, kind)))
    return len(layers)


def with_blocks_of(network: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace each linear layer whose weight in `state` is in blocks; returns the rest of the state.

    Weights in blocks that belong to other kinds of layers, or whose shape is not the layer's, become numbers.
    """
    rest = dict(state)
    for name, weight in state.items():
        if isinstance(weight, GGUFParameter):
            layer = _linear(network, name.removesuffix(".weight"))
            if layer is not None and shape_of(weight) == tuple(layer.weight.shape):
                _replace(network, name.removesuffix(".weight"), BlockLinear(layer, rest.pop(name)))
            else:
                rest[name] = dequantized(weight)
    return rest


def state_of(network: nn.Module) -> dict[str, Tensor]:
    """All weights of a network by the names that they would have as numbers."""
    numbers = {name: tensor for name, tensor in network.state_dict().items() if not name.endswith(".blocks")}
    return numbers | blocks_of(network)


def blocks_of(network: nn.Module) -> dict[str, GGUFParameter]:
    """The weights in blocks, by the names that they would have as numbers."""
    layers = [(name, module) for name, module in network.named_modules() if isinstance(module, BlockLinear)]
    return {f"{name}.weight": GGUFParameter(layer.blocks, quant_type=layer.kind) for name, layer in layers}


def _linear(network: nn.Module, name: str) -> nn.Linear | None:
    try:
        layer = network.get_submodule(name)
    except AttributeError:
        return None
    return layer if isinstance(layer, nn.Linear) else None


def dequantized(weight: GGUFParameter) -> Tensor:
    """The numbers that blocks hold, float32."""
    numbers: Tensor = dequantize_gguf_tensor(weight)
    return numbers.as_subclass(Tensor).float()


def _replace(network: nn.Module, name: str, made: BlockLinear) -> None:
    path, _, own = name.rpartition(".")
    setattr(network.get_submodule(path), own, made.train(network.training))


def is_block(tensor: Tensor) -> bool:
    """Whether a tensor is rows of blocks."""
    return isinstance(tensor, GGUFParameter)


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """The shape of a tensor's numbers, in blocks or not."""
    return tuple(tensor.quant_shape if isinstance(tensor, GGUFParameter) else tensor.shape)


def is_in_blocks(network: nn.Module) -> bool:
    """Whether a network has weights in blocks."""
    return any(isinstance(module, BlockLinear) for module in network.modules())


def holds_numbers(network: nn.Module) -> bool:
    """Whether all weights are usual tensors: neither in blocks nor of a class of their own, like torchao's."""
    return not is_in_blocks(network) and all(type(parameter) is nn.Parameter for parameter in network.parameters())
