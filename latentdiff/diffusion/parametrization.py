"""Parametrizations: what a network F predicts, as the coefficients that turn its output into x0.

    x0 = skip x_t + out F(scale x_t, time)

                   skip                        out                     F is trained towards
    epsilon        1 / alpha                   -sigma / alpha          noise                        Ho et al. 2020
    sample         0                           1                       x0
    v_prediction   alpha                       -sigma                  alpha noise - sigma x0       Salimans & Ho 2022
    flow           1 / (alpha + sigma)         -sigma / (alpha+sigma)  noise - x0                   Liu et al. 2022
    karras         s^2 alpha / m^2             s sigma / m             (x0 - skip x_t) / out        Karras et al. 2022

with m^2 = sigma^2 + s^2 alpha^2 for data of standard deviation s. scale is 1 / m for karras and 1 for the others; the
variance-preserving v (table 1, "v-prediction") needs alpha^2 + sigma^2 = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from latentdiff.diffusion.level import NoiseLevel

Array = Any  # as in core.arrays, which imports NumPy: help texts name parametrizations without it
NOISIEST = 20.0  # the largest |log-SNR| that karras gives to the network: pure noise and data have no finite one


class Coefficients(NamedTuple):
    """The coefficients of the module's equation; time: the network's input beside x."""

    scale: float
    time: float
    skip: float
    out: float


Parametrization = Callable[[NoiseLevel], Coefficients]


class Network(Protocol):
    """(x, time, conditions) -> raw output like x; this is trained.

    x is (B, ...). Under K conditions at once the output is (K, B, ...).
    """

    def __call__(self, x: Array, time: Array, conditions: Any) -> Array:
        """time: one number, or (B,) numbers in training."""
        ...


class Denoiser(Protocol):
    """(x_t, level) -> x0; this is sampled."""

    def __call__(self, x: Array, level: NoiseLevel) -> Array:
        """x at `level` -> the predicted clean data, shaped like x."""
        ...


def epsilon(level: NoiseLevel) -> Coefficients:
    """The network predicts the noise. At alpha = 0 the prediction of x0 is 0, the mean of latents."""
    if level.alpha == 0:
        return Coefficients(1.0, level.t, 0.0, 0.0)
    return Coefficients(1.0, level.t, 1 / level.alpha, -level.sigma / level.alpha)


def sample(level: NoiseLevel) -> Coefficients:
    """x0 itself."""
    return Coefficients(1.0, level.t, 0.0, 1.0)


def v_prediction(level: NoiseLevel) -> Coefficients:
    """V = alpha noise - sigma x0, on variance-preserving paths."""
    return Coefficients(1.0, level.t, level.alpha, -level.sigma)


def flow(level: NoiseLevel) -> Coefficients:
    """The velocity noise - x0 of the straight line between both."""
    whole = level.alpha + level.sigma
    return Coefficients(1.0, level.t, 1 / whole, -level.sigma / whole)


def karras(level: NoiseLevel, std: float = 0.5) -> Coefficients:
    """Karras et al. 2022, table 1: input and target have unit variance; time is log(sigma / alpha) / 4."""
    m = math.sqrt(level.sigma**2 + (std * level.alpha) ** 2)
    time = max(-NOISIEST, min(-level.log_snr, NOISIEST)) / 4
    return Coefficients(1 / m, time, std**2 * level.alpha / m**2, std * level.sigma / m)


PARAMETRIZATIONS: dict[str, Parametrization] = {
    "epsilon": epsilon,
    "sample": sample,
    "v_prediction": v_prediction,
    "flow": flow,
    "karras": karras,
}


def parametrization_named(name: str) -> Parametrization:
    """The parametrization of that name. Raises ValueError for an unknown one."""
    if name not in PARAMETRIZATIONS:
        raise ValueError(f"unknown prediction {name!r}; one of {', '.join(PARAMETRIZATIONS)}")
    return PARAMETRIZATIONS[name]


def denoiser(network: Network, prediction: str, conditions: Any) -> Denoiser:
    """The denoiser of a network under its conditions, or under K at once (see Network)."""
    coefficients = parametrization_named(prediction)

    def denoise(x: Array, level: NoiseLevel) -> Array:
        c = coefficients(level)
        return x0_from(c, network(x if c.scale == 1 else c.scale * x, c.time, conditions), x)

    return denoise


def x0_from(c: Coefficients, output: Array, x: Array) -> Array:
    """The module's equation."""
    return c.skip * x + c.out * output if c.skip else c.out * output


def boundary(t: float, scaling: float = 10.0, std: float = 0.5) -> tuple[float, float]:
    """(c_skip, c_out) of a consistency function c_skip x_t + c_out x0: 1 and 0 at time 0, soon 0 and 1.

    Luo et al. 2023, equation 9, with their scaling of times and their sigma_data.
    """
    scaled = scaling * t
    return std**2 / (scaled**2 + std**2), scaled / math.sqrt(scaled**2 + std**2)


def target(prediction: str, level: NoiseLevel) -> tuple[float, float]:
    """(a, b) of the network's target a noise + b x0: the module's equation solved for F.

    Where the output does not determine x0 (epsilon at alpha 0), the target is the noise.
    """
    c = parametrization_named(prediction)(level)
    if c.out == 0:
        return 1.0, 0.0
    return -c.skip * level.sigma / c.out, (1 - c.skip * level.alpha) / c.out
