"""The optimizer and its learning-rate schedule."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def adamw(
    parameters: Iterable[nn.Parameter], learning_rate: float, beta2: float, weight_decay: float
) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov & Hutter 2019); no decay on biases, norms and other vectors."""
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, beta2), fused=True)


def trapezoid(step: int, max_steps: int, warmup_steps: int, decay: float) -> float:
    """Factor of the learning rate at `step` (from 0): a linear rise, a plateau, a linear fall to 0.

    The fall takes the last share `decay` of the steps. Because the plateau does not know where it ends, a run
    can be resumed with another max_steps and only its end moves (Haegele et al. 2024).
    """
    rise = (step + 1) / max(warmup_steps, 1)
    fall = (max_steps - step) / max(decay * max_steps, 1)
    return min(rise, 1.0, fall)
