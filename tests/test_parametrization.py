"""Parametrizations: the table of coefficients against the papers' formulas, target and x0 as inverses."""

import math

import numpy as np
import pytest

from latentdiff.diffusion.level import NoiseLevel
from latentdiff.diffusion.parametrization import PARAMETRIZATIONS, denoiser, karras, target, x0_from
from latentdiff.diffusion.path import Straight, VariancePreserving
from latentdiff.diffusion.process import diffuse

SD = VariancePreserving.scaled_linear()
LEVELS = [SD.level(400), SD.level(3), Straight().level(700), Straight().level(20), NoiseLevel(5, 0.6, 1.7)]
RNG = np.random.default_rng(0)
X0, NOISE = RNG.standard_normal((2, 3, 4))


def output_of(prediction, level):
    """What a perfect network gives."""
    a, b = target(prediction, level)
    return a * NOISE + b * X0


@pytest.mark.parametrize("level", LEVELS, ids=str)
@pytest.mark.parametrize("prediction", PARAMETRIZATIONS)
def test_a_perfect_output_gives_x0(prediction, level):
    x = diffuse(X0, NOISE, level)
    c = PARAMETRIZATIONS[prediction](level)
    np.testing.assert_allclose(x0_from(c, output_of(prediction, level), x), X0, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("level", LEVELS[:2], ids=str)
@pytest.mark.parametrize(
    ("prediction", "formula"),
    [
        ("epsilon", lambda a, s: NOISE),
        ("sample", lambda a, s: X0),
        ("v_prediction", lambda a, s: a * NOISE - s * X0),
        ("flow", lambda a, s: NOISE - X0),
    ],
)
def test_targets_are_the_papers(prediction, formula, level):
    np.testing.assert_allclose(output_of(prediction, level), formula(level.alpha, level.sigma), rtol=1e-10, atol=1e-12)


def test_karras_preconditioning():
    """Karras et al. 2022, table 1, in sigma of x / alpha, for data of standard deviation 0.5."""
    level, std = SD.level(500), 0.5
    sigma = level.sigma / level.alpha
    c_skip, c_out = std**2 / (sigma**2 + std**2), sigma * std / math.sqrt(sigma**2 + std**2)
    c_in, c_noise = 1 / math.sqrt(sigma**2 + std**2), math.log(sigma) / 4
    c = karras(level)
    assert c == pytest.approx((c_in / level.alpha, c_noise, c_skip / level.alpha, c_out), rel=1e-12)


def test_karras_has_unit_variance_in_and_out():
    """Of data N(0, 0.25): the network's input and its target have variance 1 at every level."""
    x0, noise = 0.5 * RNG.standard_normal(200_000), RNG.standard_normal(200_000)
    for level in (SD.level(10), SD.level(600), Straight().level(500)):
        c, (a, b) = karras(level), target("karras", level)
        assert (c.scale * diffuse(x0, noise, level)).std() == pytest.approx(1, rel=0.01)
        assert (a * noise + b * x0).std() == pytest.approx(1, rel=0.01)


def test_velocity_identities():
    """v = alpha eps - sigma x0; eps = sigma x_t + alpha v."""
    level = SD.level(400)
    v = output_of("v_prediction", level)
    np.testing.assert_allclose(level.sigma * diffuse(X0, NOISE, level) + level.alpha * v, NOISE, rtol=1e-12)


def test_velocities_are_derivatives():
    """v = d x / d angle on the circle, flow = d x / d s on the straight line."""
    u, h = 0.7, 1e-6
    low, high = (diffuse(X0, NOISE, NoiseLevel(0, math.cos(a), math.sin(a))) for a in (u - h, u + h))
    v = output_of("v_prediction", NoiseLevel(0, math.cos(u), math.sin(u)))
    np.testing.assert_allclose(v, (high - low) / (2 * h), rtol=1e-6, atol=1e-9)
    path = Straight(T=1)
    low, high = (diffuse(X0, NOISE, path.level(s)) for s in (u - h, u + h))
    np.testing.assert_allclose(output_of("flow", path.level(u)), (high - low) / (2 * h), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("prediction", PARAMETRIZATIONS)
def test_pure_noise_is_finite(prediction):
    """At alpha = 0 epsilon says nothing of x0, which is 0; the others give what their output says."""
    top = NoiseLevel(999, 0.0, 1.0)
    c = PARAMETRIZATIONS[prediction](top)
    assert all(map(math.isfinite, c))
    expected = {
        "epsilon": 0 * NOISE,
        "sample": NOISE,
        "v_prediction": -NOISE,
        "flow": X0 - NOISE,
        "karras": 0.5 * NOISE,
    }
    np.testing.assert_allclose(x0_from(c, NOISE, X0), expected[prediction], rtol=1e-12)
    assert target("epsilon", top) == (1.0, 0.0)


def test_several_conditions_broadcast():
    """A network run under K conditions gives K outputs; each becomes the x0 that it would alone."""

    def network(x, t, conditions):
        return conditions[..., None] * x if conditions.ndim == 1 else conditions[:, :, None] * x

    conditions, level = np.array([[0.5, 0.5, 0.5], [2.0, 2.0, 2.0]]), SD.level(400)
    both = denoiser(network, "epsilon", conditions)(X0, level)
    for k in range(2):
        np.testing.assert_allclose(both[k], denoiser(network, "epsilon", conditions[k])(X0, level))


def test_karras_scales_the_input_and_states_its_own_time():
    seen = []
    level = SD.level(300)
    denoiser(lambda x, t, _: seen.append((x, t)) or x, "karras", None)(X0, level)
    np.testing.assert_allclose(seen[0][0], karras(level).scale * X0)
    assert seen[0][1] == karras(level).time


@pytest.mark.parametrize("call", [lambda: denoiser(None, "noise", None), lambda: target("noise", SD.level(1))])
def test_unknown_prediction(call):
    with pytest.raises(ValueError, match="unknown prediction 'noise'; one of epsilon, sample, v_prediction"):
        call()
