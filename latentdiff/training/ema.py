"""The exponential moving average of weights, on torch's AveragedModel."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


def ema_of(module: nn.Module, decay: float) -> AveragedModel:
    """A copy of `module` that `update_parameters(module)` moves towards it after every step.

    The decay rises as (1 + n) / (10 + n) to its limit, so that a short run is not dominated by its start.
    """

    @torch.no_grad()
    def average(averaged: Any, current: Any, count: Any) -> None:
        n = int(count)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + n) / (10 + n)))

    return AveragedModel(module, multi_avg_fn=average)
