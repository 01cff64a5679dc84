"""The training objective: a weighted mean squared error of the network's output at one time.

Weightings are stated on the error of the noise, w(SNR) |noise - eps|^2, and translated to what the network
predicts, so that one name means one objective whatever the network's output:

    epsilon        w(SNR)
    sample         w(SNR) SNR              noise - eps = -(alpha / sigma) (x0 - x0^)
    v_prediction   w(SNR) SNR / (SNR + 1)  noise - eps = alpha (v - v^)

and "uniform" is 1 on the output itself (Ho et al. 2020, L_simple, for epsilon). All are finite at SNR = 0.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latentdiff.diffusion.parametrization import Network, target
from latentdiff.diffusion.path import NoiseSchedule

Weighting = Literal["uniform", "min_snr", "soft_min_snr", "p2"]
WEIGHTINGS: tuple[str, ...] = get_args(Weighting)


def weights(
    schedule: NoiseSchedule, prediction: str, weighting: str, gamma: float | None = None
) -> NDArray[np.float64]:
    """The weight of the squared error of the network's output at every time, (T,) float64, finite.

    min_snr (Hang et al. 2023): w = min(1, gamma / SNR), gamma 5: on x0 it is min(SNR, gamma).
    soft_min_snr (Crowson et al. 2024): w = gamma / (SNR + gamma), gamma 5.
    p2 (Choi et al. 2022): w = (1 + SNR)^-gamma, gamma 1.
    """
    a = schedule.alphas_cumprod
    snr = a / (1 - a)
    if weighting == "uniform":
        return np.ones_like(snr)
    if weighting == "min_snr":
        w = (gamma or 5) / np.maximum(snr, gamma or 5)
    elif weighting == "soft_min_snr":
        w = (gamma or 5) / (snr + (gamma or 5))
    elif weighting == "p2":
        w = (1 + snr) ** -(gamma or 1.0)
    else:
        raise ValueError(f"unknown weighting {weighting!r}; one of {', '.join(WEIGHTINGS)}")
    return w * {"epsilon": np.ones_like(snr), "sample": snr, "v_prediction": a}[prediction]


class DiffusionLoss:
    """E |target - network(alpha_t x0 + sigma_t noise, t, context)|^2 with weights, per sample."""

    def __init__(
        self, schedule: NoiseSchedule, prediction: str, weighting: str = "uniform", gamma: float | None = None
    ):
        self.prediction = prediction
        self._alpha = torch.from_numpy(np.sqrt(schedule.alphas_cumprod)).float()
        self._sigma = torch.from_numpy(np.sqrt(1 - schedule.alphas_cumprod)).float()
        self._weights = torch.from_numpy(weights(schedule, prediction, weighting, gamma)).float()

    def __call__(
        self,
        network: Network,
        x0: Tensor,
        noise: Tensor,
        t: Tensor,
        context: Any,
        perturbation: Tensor | None = None,
    ) -> Tensor:
        """x0 and noise (B, C, h, w), t (B,) whole times, context as the network takes it -> losses (B,).

        A perturbation (B, C, h, w) is added to the noise that the network is shown, not to its target: input errors
        as sampling makes them (Ning et al. 2023, alg. 2).
        """
        alpha, sigma, weight = (table.to(x0.device)[t] for table in (self._alpha, self._sigma, self._weights))
        alpha, sigma = alpha[:, None, None, None], sigma[:, None, None, None]
        shown = noise if perturbation is None else noise + perturbation
        output = network(alpha * x0 + sigma * shown, t, context)
        error = (output.float() - target(self.prediction, x0, noise, alpha, sigma)) ** 2
        loss: Tensor = weight * error.flatten(1).mean(1)
        return loss
