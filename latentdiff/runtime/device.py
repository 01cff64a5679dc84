"""Devices: which ones compute here, and models moved to them."""

from __future__ import annotations

from dataclasses import replace

import torch

from latentdiff.core.errors import ConfigError
from latentdiff.model import Model, TorchPlace

_PRECISIONS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def usable_device(name: str | torch.device | None) -> torch.device:
    """The device of that name, by default CUDA if there is one. Raises ConfigError if it cannot compute."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError):
        raise ConfigError(f"device {name!r} cannot be used here. Try cpu") from None
    return device


def check_dtype(dtype: object) -> None:
    """Raises ConfigError for a precision that no network computes in; None stands for the network's own."""
    if dtype is not None and dtype not in _PRECISIONS:
        raise ConfigError(f"torch_dtype must be a floating-point torch.dtype of 16 bits or more (got {dtype!r})")


def moved(model: Model, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Model:
    """A torch model on another device in another precision; its modules are moved in place. Raises ConfigError."""
    place = model.place if device is None else TorchPlace(usable_device(device))
    check_dtype(dtype)
    if model.quantized == "fp8" and dtype not in (None, getattr(torch, model.dtype)):
        raise ConfigError("fp8 computes in the precision that it was loaded with: choose dtype when loading")
    for network in model.modules():
        network.to(device=None if device is None else place.device, dtype=dtype)
    return replace(model, place=place)
