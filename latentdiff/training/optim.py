"""The optimizer and its learning-rate schedule."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import nn

from latentdiff.core.errors import ConfigError
from latentdiff.core.processor import multiplies_bfloat16
from latentdiff.settings.config import Training


def optimizer_of(module: nn.Module, settings: Training) -> torch.optim.Optimizer:
    """The optimizer of a config for the trained parameters.

    Biases, norms and other vectors are not decayed. `muon` (Jordan et al. 2024) moves each matrix, and each
    convolution seen as a matrix, by its orthogonalised momentum, of the same size as AdamW's step, so that one
    learning rate serves both; vectors, and the layers in and out of pixels or latents, stay with Adam. So does a table
    of words, at WORD_RATE times the rate: a word's row moves only in the steps whose captions have the word.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if settings.optimizer == "muon":
        matrices = [p for name, p in named if p.ndim > 1 and not any(edge in name for edge in _EDGES)]
        tables = [p for name, p in named if TABLE in name]
        ids = {id(p) for p in (*matrices, *tables)}
        by_adam: dict[str, Any] = {"weight_decay": 0.0, "use_fallback": True}
        groups: list[dict[str, Any]] = [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": [p for _, p in named if id(p) not in ids], **by_adam},
            {"params": tables, **by_adam, "fallback_lr_scale": WORD_RATE},
        ]
        muon: torch.optim.Optimizer = _muon()(
            [group for group in groups if group["params"]],
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
    common: dict[str, Any] = {"lr": settings.learning_rate, "betas": (0.9, settings.adam_beta2)}
    if settings.optimizer == "adamw_8bit":
        return _adamw_8bit()(groups, **common)
    return torch.optim.AdamW(groups, **common, fused=True)


def _muon() -> type[Any]:
    """timm's Muon. It orthogonalises in bfloat16; a processor that only emulates bfloat16 does it in float32."""
    from timm.optim import muon  # slow to import

    iterate = muon.zeropower_via_newtonschulz
    if not (torch.accelerator.is_available() or multiplies_bfloat16() or isinstance(iterate, partial)):
        muon.zeropower_via_newtonschulz = partial(iterate, dtype=torch.float32)
    kind: type[Any] = muon.Muon
    return kind


def check_optimizer(settings: Training) -> None:
    """Raises ConfigError if the optimizer's library is not installed."""
    if settings.optimizer == "adamw_8bit":
        _adamw_8bit()


def _adamw_8bit() -> type[torch.optim.Optimizer]:
    """Moments in 8 bits (Dettmers et al. 2022): a quarter of AdamW's memory."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ConfigError(
            "optimizer adamw_8bit requires bitsandbytes. Install it: pip install 'latentdiff[8bit]'"
        ) from None
    kind: type[torch.optim.Optimizer] = AdamW8bit
    return kind


WORD_RATE = 5.0
TABLE = "token_embedding"  # in the name of a table of words
_EDGES = ("conv_in", "conv_out", "embedding")


def learning_rate(step: int, settings: Training) -> float:
    """The rate of `step` (from 0): a linear rise over the warm-up, then the schedule.

    The trapezoid's plateau does not depend on the last step, so a run can be resumed with another max_train_steps and
    only its end moves (Haegele et al. 2024). The cosine is half a period (Loshchilov and Hutter 2017, eq. 5).
    """
    rise = min((step + 1) / max(settings.lr_warmup_steps, 1), 1.0)
    return settings.learning_rate * min(rise, _course(step, settings))


def _course(step: int, settings: Training) -> float:
    """The schedule's factor, from 1 after the warm-up to 0 after the last step."""
    left = (settings.max_train_steps - step) / max(settings.max_train_steps - settings.lr_warmup_steps, 1)
    if settings.lr_schedule == "constant":
        return 1.0
    if settings.lr_schedule == "linear":
        return min(left, 1.0)
    if settings.lr_schedule == "cosine":
        return 0.5 * (1 - math.cos(math.pi * min(left, 1.0)))
    fall: float = (settings.max_train_steps - step) / max(settings.lr_decay * settings.max_train_steps, 1)
    return min(fall, 1.0)
