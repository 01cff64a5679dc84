"""T2I-Adapter (Mou et al. 2023): a small network whose features of a picture are added inside each level of a U-Net's
encoder: diffusers.T2IAdapter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.core.turn import Turn
from latentdiff.networks.conditions import FEATURE, Conditions


class T2IAdapter(nn.Module):
    """hint (B, 3, H, W) in [0, 1] -> features (B, C, h, w), one for each level. They depend on nothing else."""

    adds, once, guesses, kinds = FEATURE, True, False, 0

    def __init__(self, model: Any):
        super().__init__()
        self.model, self._turn = model, Turn()

    @property
    def channels(self) -> int:
        """The channels that it reads: three, or one, the mean of equal ones."""
        return int(self.model.config.in_channels)

    @property
    def dtype(self) -> torch.dtype:
        """The precision of its weights."""
        return next(self.parameters()).dtype

    @torch.no_grad()
    def residuals(
        self, x: Tensor, t: Tensor, conditions: Conditions, hint: Tensor, *, scale: float, guess: bool, kind: int
    ) -> list[Tensor]:
        """The features times a scale; see GivesResiduals."""
        seen = hint.mean(1, keepdim=True) if self.channels == 1 else hint
        with self._turn:
            return [scale * feature for feature in self.model(seen.to(self.dtype))]
