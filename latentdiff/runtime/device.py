"""Where networks compute."""

from __future__ import annotations

import torch

from latentdiff.core.errors import ConfigError

_PRECISIONS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def usable_device(name: str | torch.device | None) -> torch.device:
    """The device of that name, or CUDA where there is one. Raises ConfigError for one that cannot be computed on."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError):
        raise ConfigError(f"device {name!r} cannot be used here. Try cpu") from None
    return device


def check_dtype(dtype: object) -> None:
    """Raises ConfigError for what no network computes in; None is its own."""
    if dtype is not None and dtype not in _PRECISIONS:
        raise ConfigError(f"torch_dtype must be a floating-point torch.dtype of 16 bits or more (got {dtype!r})")
