"""Distances between sets of features: identities, closed forms, and torchmetrics on the same features."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_mmd

from latentdiff.evaluation import distances as module
from latentdiff.evaluation.distances import (
    cmmd,
    distances,
    frechet,
    frechet_extrapolated,
    inside,
    kernel,
    nearest,
    vendi,
)
from latentdiff.evaluation.jackknife import jackknife
from latentdiff.evaluation.result import mean


def normal(count, width, seed, mean=0.0, std=1.0):
    return mean + std * np.random.default_rng(seed).normal(size=(count, width))


class Features(nn.Module):
    """The features themselves, for a metric that wants a network."""

    num_features = 6

    def forward(self, x):
        return x


@pytest.fixture
def sets():
    return normal(300, 6, 0).astype(np.float32), normal(300, 6, 1, 0.3, 1.4).astype(np.float32)


def test_frechet_identities(sets):
    a, b = sets
    assert frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-6)
    shift = np.arange(6) / 10
    assert frechet(a, a + shift) == pytest.approx((shift**2).sum(), rel=1e-5)
    mean, spread = a.mean(0), np.cov(a, rowvar=False).trace()
    assert frechet(a, 2 * a) == pytest.approx((mean**2).sum() + spread, rel=1e-5)  # tr(C + 4 C - 2 sqrt(4 C C))


def test_frechet_of_known_gaussians():
    """N(0, I) from N(0, 4 I): d, as N grows."""
    assert frechet(normal(200_000, 4, 0), normal(200_000, 4, 1, std=2.0)) == pytest.approx(4, rel=0.02)


def test_frechet_as_torchmetrics_has_it(sets):
    theirs = FrechetInceptionDistance(feature=Features(), normalize=True)
    theirs.set_dtype(torch.float64)
    for values, real in zip(sets, (True, False), strict=True):
        theirs.update(torch.from_numpy(values), real=real)
    assert frechet(*sets) == pytest.approx(float(theirs.compute()), rel=1e-4)


def test_frechet_bias_of_finite_samples():
    """2 d / N + d (d + 1) / (2 N) for N of N(0, I_d) on both sides; extrapolated, it is gone."""
    d, count = 6, 1500
    pairs = [(normal(count, d, 2 * n), normal(count, d, 2 * n + 1)) for n in range(60)]
    outcome = np.array([frechet(*pair) for pair in pairs])
    error = outcome.std(ddof=1) / math.sqrt(len(outcome))
    assert abs(outcome.mean() - (2 * d / count + d * (d + 1) / (2 * count))) < 3 * error + 2e-4  # the next order
    assert outcome.mean() > 20 * error
    limit = np.array([frechet_extrapolated(*pair) for pair in pairs])
    assert abs(limit.mean()) < 3 * limit.std(ddof=1) / math.sqrt(len(limit))


def kernel_of_moments(first, second):
    """E (a b + 1)^3 of independent a and b with these moments of order 1, 2, 3."""
    return first[2] * second[2] + 3 * first[1] * second[1] + 3 * first[0] * second[0] + 1


@pytest.mark.slow
def test_kernel_of_known_distributions():
    """N(0, 1) from N(m, 1) in one dimension, by their moments; and no bias where they are the same."""
    m = 0.5
    still, moved = (0, 1, 0), (m, 1 + m**2, m**3 + 3 * m)
    exact = kernel_of_moments(still, still) + kernel_of_moments(moved, moved) - 2 * kernel_of_moments(still, moved)
    outcome = jackknife(kernel, normal(8_000, 1, 0), normal(8_000, 1, 1, m))
    assert abs(outcome.value - exact) < 3 * outcome.error
    assert outcome.error < 0.1 * exact
    none = jackknife(kernel, normal(8_000, 3, 2), normal(8_000, 3, 3))
    assert abs(none.value) < 3 * none.error


def test_kernel_as_torchmetrics_has_it(sets):
    """The mean over the same blocks."""
    blocks = [[torch.from_numpy(each[i : i + 30]).double() for i in range(0, 300, 30)] for each in sets]
    theirs = [float(poly_mmd(blocks[0][n], blocks[1][(n + 1) % 10])) for n in range(10)]
    assert kernel(*sets) == pytest.approx(np.mean(theirs), rel=1e-6)


def test_pictures_of_the_same_captions_do_not_lower_the_kernel():
    """Sets whose rows go together are as far apart as others of their distributions."""
    pairs = [normal(200, 4, seed) for seed in range(40)]
    outcome = np.array([kernel(each, each) for each in pairs])
    assert abs(outcome.mean()) < 3 * outcome.std(ddof=1) / math.sqrt(len(outcome))


def test_cmmd_by_loops(sets):
    units = [each[:40] / np.linalg.norm(each[:40], axis=1, keepdims=True) for each in sets]

    def mean_of(a, b):
        return np.mean([[math.exp(-((x - y) ** 2).sum() / 200) for y in b] for x in a])

    a, b = units
    wanted = 1000 * (mean_of(a, a) + mean_of(b, b) - 2 * mean_of(a, b))
    outcome = cmmd(a, b)
    assert outcome.value == pytest.approx(wanted, rel=1e-6)
    assert cmmd(a, a).value == pytest.approx(0, abs=1e-9)
    by_hand = jackknife(lambda x, y: 1000 * (mean_of(x, x) + mean_of(y, y) - 2 * mean_of(x, y)), a, b)
    assert outcome.error == pytest.approx(by_hand.error, rel=1e-6), "of the kernel's sums, as of the rows"


def test_precision_and_recall_by_trees():
    picture, real = normal(200, 3, 0), normal(250, 3, 1, 0.5)

    def by_trees(points, others):
        """The share of points in the ball of any other one, whose radius is as far as its 3rd nearest."""
        radii = cKDTree(others).query(others, 4)[0][:, 3]
        return np.mean([(np.linalg.norm(others - point, axis=1) <= radii).any() for point in points])

    assert inside(picture, real) == pytest.approx(by_trees(picture, real), abs=1e-6)
    assert inside(real, picture) == pytest.approx(by_trees(real, picture), abs=1e-6)
    assert inside(picture, picture) == 1
    assert inside(picture, picture + 100) == 0
    assert inside(0.01 * picture, real) == 1
    assert inside(real, 0.01 * picture) < 0.1


def test_some_rows_at_a_time(sets, monkeypatch):
    """All of them at once or seven: the same."""
    names = np.arange(300).astype(str)
    options = {
        "inside": lambda: inside(*sets),
        "cmmd": lambda: cmmd(*sets).value,
        "nearest": lambda: nearest(*sets, but=(names, names[::-1]))[1].sum(),
    }
    whole = {name: outcome() for name, outcome in options.items()}
    monkeypatch.setattr(module, "AT_ONCE", 7)
    for name, outcome in options.items():
        assert outcome() == pytest.approx(whole[name], rel=1e-6), name


def test_the_jackknife_of_a_mean_is_that_of_its_parts():
    """Of parts of one size: the standard error of the mean of their means; and of one row each, that of the mean."""
    rows = normal(100, 1, 0)
    outcome = jackknife(lambda x: float(x.mean()), rows, better="lower")
    assert outcome.value == pytest.approx(rows.mean())
    assert outcome.error == pytest.approx(mean(rows.reshape(10, 10).mean(1)).error)
    assert np.mean(outcome.each) == pytest.approx(outcome.value)
    assert outcome.better == "lower"
    few = rows[:7]
    assert jackknife(lambda x: float(x.mean()), few).error == pytest.approx(mean(few[:, 0]).error)
    assert jackknife(lambda x: float(x.mean()), rows, often=99).error is None


@pytest.mark.slow
def test_the_jackknife_tells_how_far_distances_spread():
    """Where sets differ their spread over draws, within what 40 draws tell; where they do not, no less than it."""

    def spread(statistic, shift):
        outcome = [
            jackknife(statistic, normal(300, 4, 2 * n), normal(300, 4, 2 * n + 1, shift, 1 + shift)) for n in range(40)
        ]
        return np.std([figure.value for figure in outcome], ddof=1), np.sqrt(np.mean([f.error**2 for f in outcome]))

    for statistic in (frechet, lambda a, b: cmmd(a, b).value):
        true, estimate = spread(statistic, 0.5)
        assert 0.7 * true < estimate < 1.5 * true
        true, estimate = spread(statistic, 0.0)
        assert 0.8 * true < estimate < 3 * true
    true, estimate = spread(inside, 0.5)
    assert 0.8 * true < estimate < 3 * true


@pytest.mark.parametrize("shared", [0.0, 0.9, 1.0])
def test_the_error_of_the_kernel(shared):
    """Also where rows of one number are alike, as pictures of one caption are, so that neighbouring blocks agree."""
    outcome = []
    for number in range(80):
        real, other = normal(200, 4, 2 * number), normal(200, 4, 2 * number + 1)
        outcome.append(jackknife(kernel, shared * real + math.sqrt(1 - shared**2) * other, real))
    true = np.std([figure.value for figure in outcome], ddof=1)
    estimate = math.sqrt(np.mean([figure.error**2 for figure in outcome]))
    assert 0.85 * true < estimate < 3 * true


def test_two_models_on_the_same_pictures_have_a_smaller_error():
    """The difference of two Frechet distances from one set, whose own draws cancel."""
    real, picture = normal(400, 4, 0), normal(400, 4, 1, 0.3)
    first, second = (jackknife(frechet, each, real, better="lower") for each in (picture, picture + 0.02))
    by = second.worse(first)
    assert by.value == pytest.approx(second.value - first.value)
    assert by.error < 0.3 * math.hypot(first.error, second.error)


def test_vendi():
    assert vendi(np.ones((5, 3))) == pytest.approx(1)
    assert vendi(np.eye(7)) == pytest.approx(7)
    assert vendi(3 * np.repeat(np.eye(2), 4, 0)) == pytest.approx(2)
    assert vendi(np.repeat(np.eye(2), [6, 2], 0)) == pytest.approx(
        math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    )


def test_nearest():
    where, cosines = nearest(np.array([[2.0, 0], [1, 1]]), np.array([[0, 5.0], [-1, 0], [3, 3]]))
    assert where.tolist() == [2, 2]
    assert cosines == pytest.approx([math.sqrt(0.5), 1])
    features, names = np.array([[1.0, 0], [1, 1], [0, 1]]), np.array(["a", "b", "c"])
    where, cosines = nearest(features, features, but=(names, names))
    assert (where[0], where[2]) == (1, 1)
    assert cosines == pytest.approx([math.sqrt(0.5)] * 3)
    where, _ = nearest(features, features, but=(names, names[[1, 0, 2]]))
    assert where.tolist() == [0, 1, 1]


def test_which_are_told():
    """CMMD only for CLIP's embeddings; an extrapolation only with enough pictures."""
    a, b = normal(64, 8, 0), normal(64, 8, 1)
    assert distances(a, b, unit=True).keys() == {
        "frechet",
        "frechet_extrapolated",
        "kernel",
        "precision",
        "recall",
        "cmmd",
    }
    assert distances(a[:24], b[:24], unit=False).keys() == {"frechet", "kernel", "precision", "recall"}
    assert {name: figure.better for name, figure in distances(a, b, unit=True).items()} == {
        "frechet": "lower",
        "frechet_extrapolated": "lower",
        "kernel": "lower",
        "precision": "higher",
        "recall": "higher",
        "cmmd": "lower",
    }
    assert all(figure.error is not None for figure in distances(a, b, unit=True).values())
