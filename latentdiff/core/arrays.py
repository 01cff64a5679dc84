"""Arrays of NumPy or of torch: sampling is written once, for both.

Most functions have the same name in both: `library(x).where(...)`, `.concatenate`, `.stack`, `.isfinite`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = Any  # a NumPy array or a torch tensor
Put = Callable[[Array], Array]  # moves an array to the library and the device of the networks


def library(array: Array) -> Any:
    """The module whose functions take this array: numpy or torch."""
    if isinstance(array, np.ndarray | np.generic):
        return np
    import torch

    return torch


def zeros(like: Array, shape: tuple[int, ...]) -> Array:
    """Zeros of that shape in another array's library, precision and place."""
    return np.zeros(shape, like.dtype) if library(like) is np else like.new_zeros(shape)


def beside(like: Array, array: Array, *, exact: bool = False) -> Array:
    """The same numbers in another array's library and place, and in its precision unless they are to stay `exact`."""
    if library(like) is np:
        return np.asarray(array, None if exact else like.dtype)
    import torch

    return torch.as_tensor(array).to(like.device, None if exact else like.dtype)


def as_tensor(array: Array) -> Array:
    """The same numbers as a torch tensor that shares their memory."""
    import torch

    return torch.as_tensor(array)


def to_numpy(array: Array) -> np.ndarray:
    """The same numbers as a NumPy array; floats narrower than float32 become float32."""
    if library(array) is np:
        return np.asarray(array)
    tensor = array.detach().cpu()
    return np.asarray((tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor).numpy())
