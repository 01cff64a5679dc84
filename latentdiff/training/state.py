"""The state of a training as named tensors, and back: weights, their average, the optimizer's state.

Restored tensors equal the saved ones to the bit, in the memory order of their parameters: torch's fused optimizers
walk both side by side, so another order (channels_last) would move the wrong weights. Sharded
parameters (FSDP2's DTensors) are gathered and scattered again, so that a checkpoint does not depend on ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from latentdiff.core.errors import ModelError
from latentdiff.training.checkpoint import Tensors
from latentdiff.training.ema import Ema

_NUMBERS = {int: torch.int64, bool: torch.int64, float: torch.float64}  # how a checkpoint holds Python's numbers


@dataclass(frozen=True)
class Trained:
    """The module as prepared for the device, by its parts; the average of its weights; its optimizer."""

    parts: Mapping[str, nn.Module]
    ema: Ema
    optimizer: torch.optim.Optimizer

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Every trained parameter, by part and name."""
        return {
            f"{part}.{name}": parameter
            for part, module in self.parts.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }


def gather(trained: Trained) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Whole tensors on the CPU, one part after another, then `ema` and `optimizer`. Every rank must iterate over it.

    Tensors that are already on the CPU are not copied: use them before the next step.
    """
    for part, tensors in _tensors(trained):
        yield part, {name: _whole(tensor) for name, tensor in tensors.items()}


def size(trained: Trained) -> int:
    """The bytes of all gathered tensors."""
    return sum(tensor.nbytes for _, tensors in _tensors(trained) for tensor in tensors.values())


def _tensors(trained: Trained) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    for part, module in trained.parts.items():
        yield part, module.state_dict()
    yield "ema", trained.ema.averaged
    yield (
        "optimizer",
        {
            f"{name}.{slot}": value if isinstance(value, Tensor) else torch.tensor(value, dtype=_NUMBERS[type(value)])
            for name, parameter in trained.parameters.items()
            for slot, value in trained.optimizer.state[parameter].items()
            if isinstance(value, Tensor | int | float)  # the rest of a parameter's state follows from its shape
        },
    )


@torch.no_grad()
def restore(trained: Trained, tensors: Tensors) -> None:
    """Copy gathered tensors back. Raises ModelError if they belong to another network."""
    expected = {*trained.parts, "ema", "optimizer"}
    if set(tensors) != expected:
        raise ModelError(f"checkpoint has {', '.join(sorted(tensors))}; the run requires {', '.join(sorted(expected))}")
    for part, module in trained.parts.items():
        _fill(module.state_dict(), tensors[part], part)
    _fill(trained.ema.averaged, tensors["ema"], "ema")
    _restore_optimizer(trained, tensors["optimizer"])


def unshard(module: nn.Module) -> None:
    """Replace FSDP2's shards by whole parameters, for saving. Every rank must call it."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if isinstance(parameter, DTensor):
                part.register_parameter(name, nn.Parameter(parameter.full_tensor(), parameter.requires_grad))


def _fill(targets: Mapping[str, Tensor], values: Mapping[str, Tensor], part: str) -> None:
    if set(targets) != set(values):
        odd = sorted(set(targets) ^ set(values))
        raise ModelError(f"checkpoint belongs to another network: {part} differs in {len(odd)} tensors, first {odd[0]}")
    for name, target in targets.items():
        if target.shape != values[name].shape:
            shapes = f"{tuple(values[name].shape)}, not {tuple(target.shape)}"
            raise ModelError(f"checkpoint belongs to another network: {part} {name} is {shapes}")
        target.copy_(_like(values[name], target))


def _restore_optimizer(trained: Trained, flat: Mapping[str, Tensor]) -> None:
    parameters = trained.parameters
    slots: dict[str, dict[str, Any]] = {name: {} for name in parameters}
    for key, value in flat.items():
        name, slot = key.rsplit(".", 1)
        if name not in parameters:
            raise ModelError(f"checkpoint belongs to another network: {name} is not trained here")
        slots[name][slot] = value.item() if value.dtype in _NUMBERS.values() and value.ndim == 0 else value
    groups = trained.optimizer.state_dict()["param_groups"]
    numbers = {
        id(parameter): number
        for group, saved in zip(trained.optimizer.param_groups, groups, strict=True)
        for parameter, number in zip(group["params"], saved["params"], strict=True)
    }
    state = {numbers[id(parameters[name])]: entries for name, entries in slots.items() if entries}
    trained.optimizer.load_state_dict({"state": state, "param_groups": groups})  # moves each slot to the right device
    for parameter in parameters.values():
        for slot, value in trained.optimizer.state[parameter].items():
            if isinstance(value, Tensor) and slot != "step" and value.shape == parameter.shape:
                ordered = torch.empty_like(parameter, dtype=value.dtype)
                trained.optimizer.state[parameter][slot] = ordered.copy_(_like(value, ordered))


def _whole(tensor: Tensor) -> Tensor:
    """A tensor gathered from all ranks, in row-major order on the CPU."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu().contiguous()


def _like(value: Tensor, target: Tensor) -> Tensor:
    """`value`, sharded over ranks like `target`."""
    if isinstance(target, DTensor):
        return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    return value
