"""Guidance: functions from denoisers to denoisers. Networks and samplers do not know about it.

`many` is a denoiser under several conditions at once, which returns all of them in one batch, (K, B, C, h, w); in
`both` the unconditional comes first, the conditional second. Wrappers that look at the same network share its one
evaluation through `once`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from latentdiff.core.arrays import library
from latentdiff.diffusion.level import NoiseLevel
from latentdiff.diffusion.parametrization import Array, Denoiser, parametrization_named, x0_from

TINY = 1e-30  # keeps 0 / 0 finite


def once(denoise: Denoiser) -> Denoiser:
    """The same denoiser with a memory of its last result, for a second call at the same x and level."""
    last: tuple[Array, NoiseLevel, Array] | None = None

    def remembering(x: Array, level: NoiseLevel) -> Array:
        nonlocal last
        if last is None or last[0] is not x or last[1] != level:
            last = (x, level, denoise(x, level))
        return last[2]

    return remembering


def chosen(many: Denoiser, index: int) -> Denoiser:
    """The denoiser under one of several conditions."""
    return lambda x, level: many(x, level)[index]


def paired(worse: Denoiser, better: Denoiser) -> Denoiser:
    """Two denoisers as the two conditions of `both`.

    Classifier-free guidance of a weaker model and the model itself is autoguidance (Karras et al. 2024, eq. 3).
    """
    return lambda x, level: (worse(x, level), better(x, level))


def classifier_free(both: Denoiser, scale: float) -> Denoiser:
    """Uncond + scale (cond - uncond); scale 1 is the conditional model (Ho & Salimans 2022, eq. 6).

    Guiding x0 is guiding epsilon or v: at one level all three are affine in each other.
    """

    def denoise(x: Array, level: NoiseLevel) -> Array:
        uncond, cond = both(x, level)
        return uncond + scale * (cond - uncond)

    return denoise


def of_text_and_image(both: Denoiser, free: Denoiser, text: float, image: float) -> Denoiser:
    """Free + image (uncond - free) + text (cond - uncond), for editing (Brooks et al. 2023, eq. 3).

    both: under the picture to edit, without and with the prompt; free: without either.
    """

    def denoise(x: Array, level: NoiseLevel) -> Array:
        uncond, cond = both(x, level)
        none = free(x, level)
        return none + image * (uncond - none) + text * (cond - uncond)

    return denoise


def apg(both: Denoiser, scale: float, *, eta: float = 0.0, norm: float = math.inf, momentum: float = 0.0) -> Denoiser:
    """Adaptive projected guidance (Sadat et al. 2024, algorithm 1), which does not oversaturate at large scales.

    The difference of the conditions is added to `momentum` times the running sum of earlier ones (negative momentum
    pushes against them) and cut to at most `norm` a picture; its part parallel to cond is multiplied by `eta` (1 is
    plain guidance). One result serves one walk through the levels: it remembers the differences.
    """
    running: Array = 0.0

    def denoise(x: Array, level: NoiseLevel) -> Array:
        nonlocal running
        uncond, cond = both(x, level)
        running = cond - uncond + momentum * running
        difference = running
        if math.isfinite(norm):
            difference = difference * _each(norm / _lengths(difference).clip(norm, math.inf), x)
        along = _sums(difference * cond) / (_lengths(cond) ** 2 + TINY)
        parallel = _each(along, x) * cond
        return cond + (scale - 1) * (difference - parallel + eta * parallel)

    return denoise


def rescaled(guided: Denoiser, cond: Denoiser, share: float, prediction: str) -> Denoiser:
    """Guidance pulled back to the conditional standard deviation (Lin et al. 2023, eq. 15-16).

    The deviation is that of each picture's network output, which the parametrization turns into x0; `share` in [0, 1]
    is the mixing factor phi. Nothing changes where the output does not determine x0: an epsilon network at zero SNR.
    """
    coefficients = parametrization_named(prediction)

    def denoise(x: Array, level: NoiseLevel) -> Array:
        c, x0 = coefficients(level), guided(x, level)
        if c.out == 0:
            return x0
        output, plain = ((each - c.skip * x) / c.out for each in (x0, cond(x, level)))
        flat = (len(x), -1)
        target, actual = plain.reshape(flat).std(1), output.reshape(flat).std(1)
        constant = actual == 0
        ratio = (target + constant) / (actual + constant)
        return x0_from(c, output * _each(share * ratio + (1 - share), x), x)

    return denoise


def renormed(guided: Denoiser, cond: Denoiser, side: int, prediction: str) -> Denoiser:
    """Guidance that keeps the length of the network's conditional output in each token of side x side (Wu et al. 2025).

    Tokens of zeros stay.
    """
    coefficients = parametrization_named(prediction)

    def length(tokens: Array) -> Array:
        return (tokens**2).sum((1, 3, 5), keepdims=True) ** 0.5

    def denoise(x: Array, level: NoiseLevel) -> Array:
        c, x0 = coefficients(level), guided(x, level)
        if c.out == 0:
            return x0
        rows, channels, height, width = x.shape
        shape = (rows, channels, height // side, side, width // side, side)
        output, plain = (((each - c.skip * x) / c.out).reshape(shape) for each in (x0, cond(x, level)))
        actual = length(output)
        output = output * (length(plain) / (actual + (actual == 0)))
        return x0_from(c, output.reshape(x.shape), x)

    return denoise


def thresholded(guided: Denoiser, cond: Denoiser, quantile: float) -> Denoiser:
    """Dynamic thresholding (Saharia et al. 2022, section 2.3): the largest of |x0| are cut, then all is scaled down.

    The limit is not 1, as for pixels, but the quantile of |x0| without guidance, picture by picture: latents have no
    other bounds.
    """

    def denoise(x: Array, level: NoiseLevel) -> Array:
        x0 = guided(x, level)
        limit = _each(_quantiles(abs(cond(x, level)), quantile), x)
        actual = _each(_quantiles(abs(x0), quantile), x)
        excess = ((actual + TINY) / (limit + TINY)).clip(1, math.inf)
        return x0.clip(-excess * limit, excess * limit) / excess

    return denoise


def away_from(guided: Denoiser, cond: Denoiser, worse: Denoiser, scale: float) -> Denoiser:
    """Guided + scale (cond - worse): perturbed-attention guidance (Ahn et al. 2024, eq. 14), where `worse` is the
    network with the identity for its self-attention maps.
    """
    return lambda x, level: guided(x, level) + scale * (cond(x, level) - worse(x, level))


def within(guided: Denoiser, plain: Denoiser, lowest: float = -math.inf, highest: float = math.inf) -> Denoiser:
    """`guided` where lowest <= log-SNR <= highest, `plain` elsewhere (Kynkaanniemi et al. 2024)."""

    def denoise(x: Array, level: NoiseLevel) -> Array:
        return (guided if lowest <= level.log_snr <= highest else plain)(x, level)

    return denoise


def toward(
    denoise: Denoiser, gradient: Callable[[Array], Array], scale: float, *, radius: float = math.inf
) -> Denoiser:
    """x0 + scale variance gradient(x0), for the gradient in x0 of the log-probability of the target.

    Bayes' rule for the posterior mean: E[x0 | x_t, y] = E[x0 | x_t] + Cov[x0 | x_t] grad log p(y | x0) for a Gaussian
    posterior, whose variance is sigma^2 / (alpha^2 + sigma^2) for data of unit variance (Song et al. 2023, PiGDM,
    section 3.2). The gradient is valid only near x0, so a picture moves by at most `radius`, root mean square over its
    values.
    """

    def steered(x: Array, level: NoiseLevel) -> Array:
        x0 = denoise(x, level)
        variance = level.sigma**2 / (level.alpha**2 + level.sigma**2)
        change = scale * variance * gradient(x0)
        if math.isfinite(radius):
            excess = _lengths(change) / (radius * (x0.reshape(len(x), -1).shape[1]) ** 0.5)
            change = change / _each(excess.clip(1, math.inf), x)
        return x0 + change

    return steered


def keep(denoise: Denoiser, known: Array, mask: Array, levels: Sequence[NoiseLevel]) -> Denoiser:
    """Inpainting with any network: x0 is the prediction where `mask` is 1, and `known` where it is 0.

    If x starts as diffused `known`, the known region stays at alpha known + sigma noise. Where the mask is w between 0
    and 1, `known` holds until the last share w of the steps (Levin and Fried 2023, algorithm 1), so that soft edges
    change gradually. levels: those of the whole walk.
    """
    steps = len(levels) - 1

    def kept(x: Array, level: NoiseLevel) -> Array:
        left = max(sum(each.ratio <= level.ratio for each in levels[:-1]), 1) / steps
        return library(x).where(mask >= left, denoise(x, level), known)

    return kept


def _each(values: Array, x: Array) -> Array:
    """One value a picture, (B,), shaped to be multiplied with x (B, ...)."""
    return values.reshape(len(x), *[1] * (x.ndim - 1))


def _sums(x: Array) -> Array:
    return x.reshape(len(x), -1).sum(1)


def _lengths(x: Array) -> Array:
    return _sums(x * x) ** 0.5


def _quantiles(x: Array, share: float) -> Array:
    """The value in each picture that a share of its values does not exceed, (B,)."""
    flat = x.reshape(len(x), -1)
    place = flat.argsort(1)[:, round(share * (flat.shape[1] - 1))]
    rows = (0 * place + 1).cumsum(0) - 1
    return flat[rows, place]
