"""Checkpoints: {weights,ema,optimizer}.safetensors and state.json in a folder that appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from latentdiff.errors import ModelError
from latentdiff.models.folder import let_others_read


@dataclass(frozen=True)
class Trained:
    """What a checkpoint holds: weights, their average and the optimizer's state."""

    module: nn.Module
    ema: AveragedModel
    optimizer: torch.optim.Optimizer


def save_checkpoint(directory: Path, trained: Trained, state: dict[str, Any], keep: int) -> Path:
    """Write `directory/step-XXXXXXXX` from state["step"], then delete all but the newest `keep`."""
    final = directory / f"step-{state['step']:08d}"
    partial = directory / f".tmp-{final.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(_contiguous(trained.module.state_dict()), partial / "weights.safetensors")
    save_file(_contiguous(trained.ema.state_dict()), partial / "ema.safetensors")
    save_file(_contiguous(_flat_optimizer(trained.optimizer)), partial / "optimizer.safetensors")
    (partial / "state.json").write_text(json.dumps(state, indent=1))
    let_others_read(partial)
    for file in partial.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    for old in checkpoints(directory)[:-keep]:
        shutil.rmtree(old)
    return final


def checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(directory.glob("step-*"))


def load_checkpoint(path: Path, trained: Trained) -> dict[str, Any]:
    """Put a checkpoint's tensors where they belong and return its state. Raises ModelError."""
    try:
        trained.module.load_state_dict(load_file(path / "weights.safetensors"))
        trained.ema.load_state_dict(load_file(path / "ema.safetensors"))
        _load_optimizer(trained.optimizer, load_file(path / "optimizer.safetensors"))
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
        return {**state, "step": int(state["step"])}
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"checkpoint {path} cannot be read ({reason}). Move it away to use the one before") from error


def _flat_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Tensors only: what else an optimizer notes about a parameter follows from its shape."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": value
        for index, slots in state.items()
        for name, value in slots.items()
        if isinstance(value, Tensor)
    }


def _load_optimizer(optimizer: torch.optim.Optimizer, flat: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in flat.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
