"""The optimizer and its learning-rate schedule."""

from __future__ import annotations

import torch
from torch import nn

from latentdiff.config import Training


def optimizer_of(module: nn.Module, settings: Training) -> torch.optim.Optimizer:
    """The optimizer a config asks for, over the parameters that are trained.

    Biases, norms and other vectors are not decayed. `muon` (Jordan et al. 2024) moves each matrix, and each
    convolution seen as a matrix, by its orthogonalised momentum, of the same size as AdamW's step, so that one
    learning rate serves both; vectors, and the layers in and out of pixels or latents, stay with Adam.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if settings.optimizer == "muon":
        from timm.optim import Muon  # slow to import

        matrices = [p for name, p in named if p.ndim > 1 and not any(edge in name for edge in _EDGES)]
        ids = {id(p) for p in matrices}
        groups = [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": [p for _, p in named if id(p) not in ids], "weight_decay": 0.0, "use_fallback": True},
        ]
        muon: torch.optim.Optimizer = Muon(
            groups,
            lr=settings.learning_rate,
            betas=(0.9, settings.adam_beta2),
            nesterov=True,
            ns_coefficients="original",
        )
        return muon
    groups = [
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, settings.adam_beta2), fused=True)


_EDGES = ("conv_in", "conv_out", "embedding")


def trapezoid(step: int, max_steps: int, warmup_steps: int, decay: float) -> float:
    """Factor of the learning rate at `step` (from 0): a linear rise, a plateau, a linear fall to 0.

    The fall takes the last share `decay` of the steps. Because the plateau does not know where it ends, a run
    can be resumed with another max_steps and only its end moves (Haegele et al. 2024).
    """
    rise = (step + 1) / max(warmup_steps, 1)
    fall = (max_steps - step) / max(decay * max_steps, 1)
    return min(rise, 1.0, fall)
