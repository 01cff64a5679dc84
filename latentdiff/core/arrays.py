"""Arrays of NumPy or of torch: what draws is written once, for both.

Nearly all that is needed has one name in both: `library(x).where(...)`, `.concatenate`, `.stack`, `.isfinite`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = Any  # a NumPy array or a torch tensor
Put = Callable[[Array], Array]  # to the library and the device that the networks compute with


def library(array: Array) -> Any:
    """The module, numpy or torch, whose functions take this array."""
    if isinstance(array, np.ndarray | np.generic):
        return np
    import torch

    return torch


def as_tensor(array: Array) -> Array:
    """As a torch tensor, in the same memory."""
    import torch

    return torch.as_tensor(array)


def to_numpy(array: Array) -> np.ndarray:
    """The same numbers as a NumPy array; what is narrower than float32 is widened to it."""
    if library(array) is np:
        return np.asarray(array)
    tensor = array.detach().cpu()
    return np.asarray((tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor).numpy())
