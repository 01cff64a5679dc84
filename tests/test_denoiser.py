"""Predictions: the identities between x0, noise and v."""

import math

import numpy as np
import pytest

from latentdiff.diffusion.parametrization import PREDICTIONS, denoiser, target, x0_from
from latentdiff.diffusion.path import NoiseLevel, NoiseSchedule
from latentdiff.diffusion.process import diffuse

LEVEL = NoiseSchedule.scaled_linear().level(400)
RNG = np.random.default_rng(0)
X0, NOISE = RNG.standard_normal((2, 3, 4))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_perfect_output_gives_x0(prediction):
    x = diffuse(X0, NOISE, LEVEL)
    output = target(prediction, X0, NOISE, LEVEL.alpha, LEVEL.sigma)
    np.testing.assert_allclose(x0_from(prediction, output, x, LEVEL), X0, rtol=1e-12)


def test_velocity_identities():
    """v = alpha eps - sigma x0; eps = sigma x_t + alpha v."""
    x = diffuse(X0, NOISE, LEVEL)
    v = target("v_prediction", X0, NOISE, LEVEL.alpha, LEVEL.sigma)
    np.testing.assert_allclose(v, LEVEL.alpha * NOISE - LEVEL.sigma * X0)
    np.testing.assert_allclose(LEVEL.sigma * x + LEVEL.alpha * v, NOISE, rtol=1e-12)


def test_velocity_is_the_derivative_along_the_angle():
    """With alpha = cos u, sigma = sin u: v = d x_t / d u."""
    u, h = 0.7, 1e-6
    low, high = (diffuse(X0, NOISE, NoiseLevel(0, math.cos(a), math.sin(a))) for a in (u - h, u + h))
    np.testing.assert_allclose(
        target("v_prediction", X0, NOISE, math.cos(u), math.sin(u)), (high - low) / (2 * h), rtol=1e-6, atol=1e-9
    )


def test_pure_noise_level():
    top = NoiseLevel(999, 0.0, 1.0)
    np.testing.assert_array_equal(x0_from("v_prediction", NOISE, X0, top), -NOISE)
    np.testing.assert_array_equal(x0_from("epsilon", NOISE, X0, top), 0 * NOISE)


def test_several_contexts_broadcast():
    """A network run under K contexts gives K outputs; each becomes the x0 that it would alone."""

    def network(x, t, context):
        return context[..., None] * x if context.ndim == 1 else context[:, :, None] * x

    contexts = np.array([[0.5, 0.5, 0.5], [2.0, 2.0, 2.0]])
    both = denoiser(network, "epsilon", contexts)(X0, LEVEL)
    for k in range(2):
        np.testing.assert_allclose(both[k], denoiser(network, "epsilon", contexts[k])(X0, LEVEL))


@pytest.mark.parametrize("call", [lambda: x0_from("noise", X0, X0, LEVEL), lambda: target("noise", X0, X0, 1, 0)])
def test_unknown_prediction(call):
    with pytest.raises(ValueError, match="unknown prediction 'noise'; one of epsilon, sample, v_prediction"):
        call()
