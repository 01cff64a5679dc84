"""The training objective: a weighted mean squared error of the network's output at one time.

Weightings are stated on the error of the noise, w(SNR) |noise - eps|^2, and translated to the network's output F, so
that one name means one objective whatever the network predicts:

    noise - eps = -(alpha / sigma) (x0 - x0^) = -(alpha / sigma) out (F* - F)    weight = w(SNR) (out alpha / sigma)^2

and "uniform" is 1 on the output itself (Ho et al. 2020, L_simple, for epsilon). All are finite at SNR = 0.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latentdiff.diffusion.level import NoiseLevel
from latentdiff.diffusion.parametrization import Network, parametrization_named, target
from latentdiff.diffusion.path import Path

Weighting = Literal["uniform", "min_snr", "soft_min_snr", "p2"]
WEIGHTINGS: tuple[str, ...] = get_args(Weighting)


def weights(path: Path, prediction: str, weighting: str, gamma: float | None = None) -> NDArray[np.float64]:
    """The weight of the squared error of the network's output at the levels 0 .. T - 1, (T,) float64, finite.

    min_snr (Hang et al. 2023): w = min(1, gamma / SNR), gamma 5: on x0 it is min(SNR, gamma).
    soft_min_snr (Crowson et al. 2024): w = gamma / (SNR + gamma), gamma 5.
    p2 (Choi et al. 2022): w = (1 + SNR)^-gamma, gamma 1.
    """
    return np.array([weight(path.numbered(n), prediction, weighting, gamma) for n in range(path.T)])


def weight(level: NoiseLevel, prediction: str, weighting: str, gamma: float | None = None) -> float:
    """The weight at one level; see `weights`. Raises ValueError for an unknown weighting."""
    if weighting == "uniform":
        return 1.0
    snr = level.snr
    if weighting == "min_snr":
        w = (gamma or 5) / max(snr, gamma or 5)
    elif weighting == "soft_min_snr":
        w = (gamma or 5) / (snr + (gamma or 5))
    elif weighting == "p2":
        w = (1 + snr) ** -(gamma or 1.0)
    else:
        raise ValueError(f"unknown weighting {weighting!r}; one of {', '.join(WEIGHTINGS)}")
    if prediction == "epsilon":
        return w
    return w * snr * parametrization_named(prediction)(level).out ** 2


class DiffusionLoss:
    """E |target - F(scale x_t, time, conditions)|^2 with weights, per sample, x_t = alpha x0 + sigma noise."""

    def __init__(self, path: Path, prediction: str, weighting: str = "uniform", gamma: float | None = None):
        self.path, self.prediction = path, prediction
        self._weighting, self._gamma = weighting, gamma
        self._table = self._at([path.numbered(n) for n in range(path.T)]) if path.has_integer_times else None

    def __call__(
        self,
        network: Network,
        x0: Tensor,
        noise: Tensor,
        t: Tensor,
        conditions: Any,
        perturbation: Tensor | None = None,
    ) -> Tensor:
        """x0 and noise (B, ...), t (B,) times of the path, conditions as the network takes them -> losses (B,).

        perturbation: like x0; it is added to the noise in the network's input but not to its target, which imitates the
        input errors of sampling (Ning et al. 2023, alg. 2).
        """
        rows = self._rows(t).to(x0.device)
        alpha, sigma, scale, on_noise, on_x0 = rows[:, :5].T.reshape(5, -1, *[1] * (x0.ndim - 1))

        perturbed = noise if perturbation is None else noise + perturbation
        time = rows[:, 5] if self.prediction == "karras" else t
        x_t = alpha * x0 + sigma * perturbed
        output = network(scale * x_t if self.prediction == "karras" else x_t, time, conditions)
        error = (output.float() - (on_noise * noise + on_x0 * x0)) ** 2
        loss: Tensor = rows[:, 6] * error.flatten(1).mean(1)
        return loss

    def _rows(self, t: Tensor) -> Tensor:
        """(B, 7): alpha, sigma, scale, target's coefficients of noise and x0, time, weight."""
        if self._table is not None and not t.is_floating_point():
            self._table = self._table.to(t.device)
            return self._table[t]
        return self._at([self.path.level(time) for time in t.tolist()])

    def _at(self, levels: list[NoiseLevel]) -> Tensor:
        coefficients = parametrization_named(self.prediction)
        rows = []
        for level in levels:
            c = coefficients(level)
            w = weight(level, self.prediction, self._weighting, self._gamma)
            rows.append((level.alpha, level.sigma, c.scale, *target(self.prediction, level), c.time, w))
        return torch.tensor(rows, dtype=torch.float64).float()
