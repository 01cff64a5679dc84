"""From what a network predicts to the clean latents it implies, and to the target it is trained on.

epsilon        x0 = (x_t - sigma eps) / alpha        target: noise                       Ho et al. 2020
sample         x0 = output                           target: x0
v_prediction   x0 = alpha x_t - sigma v              target: alpha noise - sigma x0      Salimans & Ho 2022
"""

from __future__ import annotations

from typing import Any, Literal, Protocol, get_args

from latentdiff.diffusion.path import NoiseLevel

Array = Any
Prediction = Literal["epsilon", "sample", "v_prediction"]
PREDICTIONS: tuple[str, ...] = get_args(Prediction)


class Network(Protocol):
    """(x_t, t, context) -> raw output; what is trained.

    x_t is (B, C, h, w). A context (B, L, D) gives an output like x_t; a context (K, B, L, D) runs x_t under each
    of K conditions in one batch and gives (K, B, C, h, w).
    """

    def __call__(self, x: Array, t: Array, context: Array) -> Array:
        """T is one time, or (B,) times in training."""
        ...


class Denoiser(Protocol):
    """(x_t, level) -> x0; what is sampled."""

    def __call__(self, x: Array, level: NoiseLevel) -> Array:
        """X at `level` -> the predicted clean latents, shaped like x."""
        ...


def denoiser(network: Network, prediction: str, context: Array) -> Denoiser:
    """The denoiser of a network under a context, or under K at once (see Network)."""

    def denoise(x: Array, level: NoiseLevel) -> Array:
        return x0_from(prediction, network(x, level.t, context), x, level)

    return denoise


def x0_from(prediction: str, output: Array, x: Array, level: NoiseLevel) -> Array:
    """The clean latents that a network's output implies.

    Where alpha is 0, predicted noise says nothing about x0 (0 / 0); it is taken as 0, the mean of the latents.
    """
    if prediction == "sample":
        return output
    if prediction == "v_prediction":
        return level.alpha * x - level.sigma * output
    if prediction == "epsilon":
        return (x - level.sigma * output) / level.alpha if level.alpha > 0 else 0 * output
    raise ValueError(f"unknown prediction {prediction!r}; one of {', '.join(PREDICTIONS)}")


def target(prediction: str, x0: Array, noise: Array, alpha: Array, sigma: Array) -> Array:
    """What the network's output is trained towards; alpha and sigma broadcast against x0."""
    if prediction == "sample":
        return x0
    if prediction == "v_prediction":
        return alpha * noise - sigma * x0
    if prediction == "epsilon":
        return noise
    raise ValueError(f"unknown prediction {prediction!r}; one of {', '.join(PREDICTIONS)}")
