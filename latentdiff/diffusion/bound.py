"""The bound on the likelihood of data under a denoiser, in its three terms (Ho et al. 2020, eq. 5):

    -log p(x0)  <=  L_T + sum of L_t over t = 1 .. T-1 + L_0
    L_T   prior           KL(q(x_T | x0) || N(0, I)), at the last time
    L_t   denoising       KL(q(x_s | x_t, x0) || p(x_s | x_t)), s = t - 1
    L_0   reconstruction  -log p(x0 | x_0), from the first noisy level

p(x_s | x_t) is Gaussian, around the posterior's mean for the predicted clean data, with the posterior's variance
("small") or the forward step's ("large"); so every L_t is a weight times the squared error of that prediction, plus a
constant. L_0 has the forward variance, for the posterior's is zero there: a density for latents, which are continuous,
and for 8-bit pixels the probability of their bin (eq. 13). All terms are in nats per sample; `bits` converts them.

Noise and times are keyed by the sample, and times depend on the path alone: two models, or one model with and without
captions, are compared on the same draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr

from latentdiff.core.arrays import Array, library, to_numpy
from latentdiff.diffusion import noise
from latentdiff.diffusion.level import CLEAN
from latentdiff.diffusion.path import Floats, Path
from latentdiff.diffusion.process import transition

Variance = Literal["small", "large"]
VARIANCES: tuple[str, ...] = get_args(Variance)
Predict = Callable[[Array, NDArray[np.int64]], Array]  # x (B, ...), numbers of its levels (B,) -> predicted x0
BIN = 2 / 255  # the width of an 8-bit value in [-1, 1]
_ARRAYS = ("prior", "reconstruction", "times", "squared")  # fields of `Errors` with a row a sample
_UNIFORM = 0.1  # share of times that are drawn uniformly


@dataclass(frozen=True)
class Terms:
    """L_t = weight_t |x0 - x0-hat|^2 + dimensions * constant_t at each time, (T,); time 0 is the density's L_0."""

    weight: Floats
    constant: Floats

    @classmethod
    def of(cls, path: Path, variance: str = "small") -> Terms:
        """The terms for a variance of the reverse steps. Raises ValueError for an unknown one."""
        if variance not in VARIANCES:
            raise ValueError(f"unknown variance {variance!r}; one of {', '.join(VARIANCES)}")
        levels = [path.numbered(t) for t in range(path.T)]
        first, *steps = [transition(s, t) for s, t in zip([CLEAN, *levels], levels, strict=False)]
        weights, constants = [0.5 / first.beta], [0.5 * math.log(2 * math.pi * first.beta)]
        for step in steps:
            own = step.variance if variance == "small" else step.beta
            ratio = step.variance / own
            weights.append(0.5 * step.x0**2 / own)
            constants.append(0.5 * (ratio - 1 - math.log(ratio)))
        return cls(np.array(weights), np.array(constants))

    def at(self, times: NDArray[np.int64], squared: Floats, dimensions: int) -> Floats:
        """L_t from squared errors that are summed over the dimensions, at these times; arrays of one shape."""
        return np.asarray(self.weight[times] * squared + dimensions * self.constant[times])


def proposal(path: Path) -> Floats:
    """Probabilities of the times 1 .. T-1, (T,): proportional to their terms for white data of variance 1, and a share
    that is uniform.

    Data that is easier to predict than white noise has terms that are smaller by about the same factor at most times;
    at the others the uniform share limits the weight of one draw.
    """
    alpha, sigma = _scales(path, np.arange(path.T))
    white = Terms.of(path).weight * sigma**2 / (alpha**2 + sigma**2)
    white[0] = 0
    return np.asarray((1 - _UNIFORM) * white / white.sum() + _UNIFORM * (np.arange(path.T) > 0) / (path.T - 1))


def sample_times(chances: Floats, count: int, seed: int, sample: int) -> NDArray[np.int64]:
    """`count` times of one sample by systematic sampling of their probabilities (T,): quantiles at (i + u) / count."""
    u = noise.generator(seed, "bound times", sample).random()
    quantiles = np.cumsum(chances)
    points = (np.arange(count) + u) / count * quantiles[-1]
    return np.minimum(np.searchsorted(quantiles, points, "right"), len(chances) - 1)


def prior(x0: Array, path: Path) -> Floats:
    """L_T (B,) of x0 (B, ...): 0 at zero terminal SNR."""
    last = path.numbered(path.T - 1)
    a, variance = last.alpha**2, last.sigma**2
    return np.asarray(0.5 * (a * _summed(x0**2) + _dimensions(x0) * (variance - 1 - math.log(variance))))


def noised(path: Path, x0: Array, times: NDArray[np.int64], seed: int, samples: Sequence[int]) -> Array:
    """x_t (B, ...) of rows x0 at times (B,); the noise of a row is keyed by its sample and its time."""
    draws = [noise.normal(x0.shape[1:], seed, "bound noise", i, int(t)) for i, t in zip(samples, times, strict=True)]
    alpha, sigma = (_like(each.reshape(-1, *(1,) * (x0.ndim - 1)), x0) for each in _scales(path, times))
    return alpha * x0 + sigma * _like(np.stack(draws), x0)


def _scales(path: Path, numbers: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """(alpha, sigma) of levels by their numbers, from 0."""
    return path.scales(numbers.astype(np.float64) + path.numbered(0).t)


@dataclass(frozen=True)
class Errors:
    """What the terms are computed from, for N samples: prior and reconstruction in nats, and squared errors (N, K) at
    times (N, K) drawn from the proposal.
    """

    prior: Floats
    reconstruction: Floats
    times: NDArray[np.int64]
    squared: Floats
    path: Path
    dimensions: int

    def as_tree(self) -> dict[str, Any]:
        """All fields but the path, for JSON."""
        arrays = {name: getattr(self, name).tolist() for name in _ARRAYS}
        return arrays | {"dimensions": self.dimensions}

    @classmethod
    def from_tree(cls, tree: dict[str, Any], path: Path) -> Errors:
        """The inverse of `as_tree`, to the bit."""
        arrays = {name: np.array(tree[name]) for name in _ARRAYS}
        return cls(**arrays, path=path, dimensions=tree["dimensions"])

    @classmethod
    def joined(cls, parts: Sequence[Errors]) -> Errors:
        """The samples of several evaluations on one path."""
        whole: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS}
        return replace(parts[0], **whole)

    def denoising(self, variance: str = "small") -> Floats:
        """The sum of L_t over t = 1 .. T-1, (N,): an unbiased estimate for each sample."""
        return np.asarray(self._weighed(variance).mean(1))

    def total(self, variance: str = "small") -> Floats:
        """The bound on -log p(x0), (N,) nats."""
        return self.prior + self.denoising(variance) + self.reconstruction

    def curve(self, edges: Sequence[int], variance: str = "small") -> Floats:
        """The mean L_t of a time in each bin [edges[i], edges[i + 1]), nats; NaN in a bin without draws."""
        weighed, means = self._weighed(variance), []
        for low, high in pairwise(edges):
            inside = (self.times >= low) & (self.times < high)
            means.append((weighed * inside).mean() / (high - low) if inside.any() else np.nan)
        return np.array(means)

    def _weighed(self, variance: str) -> Floats:
        terms = Terms.of(self.path, variance).at(self.times, self.squared, self.dimensions)
        return np.asarray(terms / proposal(self.path)[self.times])


def errors_of(
    predict: Predict,
    x0: Array,
    path: Path,
    *,
    count: int,
    seed: int = 0,
    samples: Sequence[int] | None = None,
    pixels: bool = False,
) -> Errors:
    """Evaluate a denoiser on N samples x0 (N, ...) at time 0 and at `count` drawn times each.

    samples: their numbers, by which draws are keyed (default: 0 .. N-1). pixels: x0 are 8-bit values in [-1, 1].
    """
    numbers = list(range(len(x0))) if samples is None else list(samples)
    chances = proposal(path)
    times = np.stack([sample_times(chances, count, seed, number) for number in numbers])
    first = np.zeros(len(x0), np.int64)
    predicted = predict(noised(path, x0, first, seed, numbers), first)
    sigma = path.numbered(0).sigma
    if pixels:
        reconstruction = -_summed(discretised(to_numpy(x0), to_numpy(predicted), sigma))
    else:
        reconstruction = Terms.of(path).at(first, _summed((x0 - predicted) ** 2), _dimensions(x0))
    squared = [_summed((x0 - predict(noised(path, x0, t, seed, numbers), t)) ** 2) for t in times.T]
    return Errors(prior(x0, path), reconstruction, times, np.stack(squared, 1), path, _dimensions(x0))


def bits(nats: Array, dimensions: int) -> Array:
    """Bits per dimension."""
    return nats / (dimensions * math.log(2))


def mean_and_error(values: Floats) -> tuple[float, float]:
    """The mean over samples and its standard error."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))


def discretised(x: NDArray[Any], mean: NDArray[Any], scale: float, kind: str = "gaussian") -> Floats:
    """Log-probabilities of 8-bit values x in [-1, 1] under a density around `mean`, integrated over their bins.

    The outermost bins are open (Ho et al. 2020, eq. 13). kind: gaussian, of standard deviation `scale`, or laplace, of
    mean absolute deviation `scale`. Bins in the upper tail are mirrored to the lower one, which keeps their digits.
    """
    log_cdf = {"gaussian": log_ndtr, "laplace": _log_laplace}[kind]
    off = x.astype(np.float64) - mean.astype(np.float64)
    low = np.where(x < -1 + BIN / 2, -np.inf, (off - BIN / 2) / scale)
    high = np.where(x > 1 - BIN / 2, np.inf, (off + BIN / 2) / scale)
    low, high = np.where(low > 0, -high, low), np.where(low > 0, -low, high)  # both densities are symmetric
    upper, lower = log_cdf(high), log_cdf(low)
    return np.asarray(upper + np.log1p(-np.exp(lower - upper)))


def _log_laplace(x: Floats) -> Floats:
    """The log of Laplace's distribution function."""
    return np.where(x < 0, np.minimum(x, 0) - math.log(2), np.log1p(-0.5 * np.exp(-np.maximum(x, 0))))


def _like(values: NDArray[Any], x: Array) -> Array:
    """The values in x's library, precision and place."""
    return values.astype(x.dtype) if library(x) is np else library(x).as_tensor(values).to(x)


def _summed(values: Array) -> Floats:
    """The sum over all axes but the first, in float64."""
    return np.asarray(to_numpy(values).astype(np.float64).reshape(len(values), -1).sum(1))


def _dimensions(x: Array) -> int:
    return math.prod(x.shape[1:])
