"""The bound of whole models: against a second computation of each of its terms, on the same draws."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from latentdiff import LatentDiffusionPipeline
from latentdiff.core.errors import ModelError, NonFiniteError
from latentdiff.core.images import to_images
from latentdiff.diffusion import noise
from latentdiff.diffusion.bound import Terms, bits, mean_and_error, noised
from latentdiff.diffusion.path import VariancePreserving
from latentdiff.evaluation.held_out import held_out, pictures_of
from latentdiff.evaluation.likelihood import _conditions, likelihood
from latentdiff.model import Model, ModelCard, TorchPlace
from latentdiff.networks.codecs.identity import IdentityCodec
from latentdiff.networks.conditions import Conditions
from latentdiff.networks.encoders.prompt import Prompt, Style
from latentdiff.networks.protocols import Spec
from latentdiff.settings.config import load_config


@pytest.fixture(scope="module")
def pictures():
    """Twenty held-out scenes with their captions."""
    return pictures_of(held_out(load_config(None), 20)[0])


@pytest.fixture(scope="module")
def exact(tiny_model):
    return LatentDiffusionPipeline.from_pretrained(tiny_model, device="cpu", runtime="torch")


@pytest.fixture(scope="module")
def result(exact, pictures):
    return likelihood(exact.model, *pictures, times=4, seed=1)


def sampled(pipe, pixels, seed):
    """Samples of the posterior, and its deviations, (N, C, h, w)."""
    with torch.no_grad():
        posterior = pipe.model.codec.vae.encode(to_images(pixels)).latent_dist
    draws = [noise.normal(tuple(posterior.mean.shape[1:]), seed, "bound posterior", n) for n in range(len(pixels))]
    return posterior.mean + posterior.std * torch.from_numpy(np.stack(draws)), posterior.std


def test_the_autoencoders_terms(exact, result, pictures):
    """By scipy's Laplace distribution with the widths of the other half, and by torch's entropy."""
    pixels, _ = pictures
    z, std = sampled(exact, pixels, 1)
    with torch.no_grad():
        decoded = exact.model.codec.decode(z).double().numpy()
    values = to_images(pixels).double().numpy()
    off = np.abs(values - decoded).mean((1, 2, 3))
    for row in range(len(pixels)):
        width = off[1 - row % 2 :: 2].mean()
        high = np.where(values[row] > 0.999, np.inf, values[row] + 1 / 255)
        low = np.where(values[row] < -0.999, -np.inf, values[row] - 1 / 255)
        of = stats.laplace(decoded[row], width)
        # in the tail that keeps its digits
        chance = np.where(low > decoded[row], of.sf(low) - of.sf(high), of.cdf(high) - of.cdf(low))
        assert result.decoder[row] == pytest.approx(-np.log(chance).sum(), rel=1e-4)
        entropy = torch.distributions.Normal(0, std[row].double()).entropy().sum()
        assert result.entropy[row] == pytest.approx(float(entropy), rel=1e-5)


@pytest.mark.slow
def test_the_latents_terms(exact, result, pictures):
    """L_0 by a normal density; the drawn times' sum against every time's, of one picture."""
    pixels, captions = pictures
    z, _ = sampled(exact, pixels, 1)
    schedule = exact.model.path
    context = torch.cat([exact.model.encoder.encode(Prompt(caption))["tokens"][None] for caption in captions])
    first = np.zeros(len(z), np.int64)
    x = noised(schedule, z, first, 1, range(len(z)))
    level = schedule.numbered(0)
    with torch.no_grad():
        x0 = level.alpha * x - level.sigma * exact.model.backbone.model(x, 0, context).sample
    wanted = -torch.distributions.Normal(x0.double(), level.sigma).log_prob(z.double()).flatten(1).sum(1)
    np.testing.assert_allclose(result.cond.reconstruction, wanted, rtol=1e-4)
    times = np.arange(1, schedule.T)
    row = z[:1].expand(len(times), -1, -1, -1)
    x = noised(schedule, row, times, 1, [0] * len(times))
    a = torch.from_numpy(schedule.alphas_cumprod[times]).float()[:, None, None, None]
    with torch.no_grad():
        v = exact.model.backbone.model(x, torch.from_numpy(times), context[:1].expand(len(times), -1, -1)).sample
    squared = ((a.sqrt() * x - (1 - a).sqrt() * v - row) ** 2).flatten(1).sum(1).double().numpy()
    terms = Terms.of(schedule)
    each = terms.weight[1:] * squared + z[0].numel() * terms.constant[1:]
    picture = likelihood(exact.model, pixels[:2], captions[:2], times=150, seed=1).cond.denoising()
    assert picture[0] == pytest.approx(each.sum(), rel=0.05)


def test_the_whole_is_the_sum_of_its_terms(result):
    total = result.decoder - result.entropy + result.cond.prior + result.cond.denoising() + result.cond.reconstruction
    np.testing.assert_allclose(result.bits(result.cond), total / (64 * 64 * 3) / math.log(2), rtol=1e-12)
    np.testing.assert_allclose(
        result.gain(), bits(result.uncond.total() - result.cond.total(), 64 * 64 * 3), atol=1e-12
    )
    assert result.dimensions == 64 * 64 * 3


def test_the_same_draws(exact, result, pictures):
    """With captions and without, of another model, and of fewer pictures; a picture without a caption gains nothing."""
    pixels, captions = pictures
    assert np.array_equal(result.cond.times, result.uncond.times)
    part = likelihood(exact.model, pixels[:3], ["", *captions[1:3]], times=4, seed=1)
    assert np.array_equal(part.cond.times, result.cond.times[:3])
    np.testing.assert_allclose(part.cond.squared[1:], result.cond.squared[1:3], rtol=1e-3)
    np.testing.assert_array_equal(part.cond.squared[0], part.uncond.squared[0])
    assert part.gain()[0] == 0
    silent = likelihood(exact.model, pixels[:3], [""] * 3, times=4, seed=1)
    np.testing.assert_array_equal(silent.cond.squared, part.uncond.squared)
    assert not np.array_equal(silent.cond.squared[1:], part.cond.squared[1:])


@pytest.mark.slow
def test_batches_are_kept(exact, result, pictures, tmp_path):
    """One that was killed after its first batch ends in the same bits; other draws do not use what is there."""

    def once(seed=1):
        return likelihood(exact.model, *pictures, times=4, seed=seed, folder=tmp_path)

    def same(made):
        return np.array_equal(made.bits(made.cond), result.bits(result.cond)) and np.array_equal(
            made.cond.curve([1, 100, 1000]), result.cond.curve([1, 100, 1000])
        )

    assert same(once())
    first, second = sorted(tmp_path.iterdir())
    second.unlink()
    before = first.stat().st_mtime_ns
    assert same(once())
    assert first.stat().st_mtime_ns == before
    assert not same(once(seed=2))
    first.write_text(first.read_text()[:-9])
    assert same(once())


def test_brackets_are_words(exact):
    """A caption is read as training reads it."""
    weighed, plain = (
        exact.model.encoder.encode(Prompt("a (red:1.5) circle", Style(weights))) for weights in (True, False)
    )
    assert not torch.equal(weighed["tokens"], plain["tokens"])
    weighted = _conditions(exact.model, ["a (red:1.5) circle"] * 2, (64, 64))
    assert torch.equal(weighted["tokens"][1], plain["tokens"])


class Exact:
    """The posterior mean of pixels N(0, s^2), as a network that predicts it; it reads no text."""

    dtype, spec = torch.float32, Spec(3, 3)

    def __init__(self, schedule, s):
        self.schedule, self.s = schedule, s

    def predict(self, x, t, conditions):
        a = torch.from_numpy(self.schedule.alphas_cumprod[t.long().numpy()]).to(x)[:, None, None, None]
        return a.sqrt() * self.s**2 / (a * self.s**2 + 1 - a) * x


def test_a_model_of_pixels(pictures):
    """Gaussian 8-bit pixels under the exact denoiser: the bound is near their entropy, which it cannot be below."""
    s, schedule = 0.25, VariancePreserving.linear(1000)
    encoder = SimpleNamespace(encode=lambda wanted: Conditions({"tokens": torch.zeros(1, 2)}))
    model = Model(Exact(schedule, s), encoder, IdentityCodec(), schedule, "sample", ModelCard(), TorchPlace())
    values = np.random.default_rng(0).normal(0, s, (40, 8, 8, 3))
    pixels = np.rint((values.clip(-1, 1) + 1) * 127.5).astype(np.uint8)
    result = likelihood(model, pixels, [""] * 40, times=32)
    a, terms = schedule.alphas_cumprod, Terms.of(schedule)
    nats = (terms.weight * s**2 * (1 - a) / (a * s**2 + 1 - a) + terms.constant).sum()
    density = bits(nats + 0.5 * (a[-1] * (s**2 - 1) - math.log1p(-a[-1])), 1) - math.log2(2 / 255)
    mean, error = mean_and_error(result.bits(result.cond))
    assert abs(mean - density) < 3 * error + 0.03, "a bin is nearly as wide as the first level's noise"
    assert mean > math.log2(s * math.sqrt(2 * math.pi * math.e) * 255 / 2) + 3 * error, "a bound on the entropy"
    assert not result.decoder.any()
    assert not result.entropy.any()


def test_what_has_no_likelihood(exact, pictures):
    pixels, captions = pictures
    with pytest.raises(ModelError, match="a tiny VAE has no posterior, so pixels have no likelihood"):
        likelihood(SimpleNamespace(codec=object()), pixels, captions, times=1)
    weight = exact.model.backbone.model.conv_out.weight
    with torch.no_grad():
        before = weight.clone()
        weight[0] = float("nan")
    try:
        with pytest.raises(NonFiniteError, match="the likelihood is not finite"):
            likelihood(exact.model, pixels[:2], captions[:2], times=1)
    finally:
        with torch.no_grad():
            weight.copy_(before)


@pytest.mark.slow
def test_captions_lower_that_of_the_default_model(pictures):
    """By far more than the error, under both variances; and noise in the weights raises it."""
    pipe = LatentDiffusionPipeline.from_pretrained("scenes-64", runtime="torch", device="cpu")
    result = likelihood(pipe.model, *pictures, times=4)
    for variance in ("small", "large"):
        mean, error = mean_and_error(result.gain(variance))
        assert mean > 5 * error
    with torch.no_grad():
        for parameter in pipe.model.backbone.parameters():
            parameter += 0.05 * parameter.std() * torch.from_numpy(noise.normal(tuple(parameter.shape), 0, "damage"))
    worse = likelihood(pipe.model, *pictures, times=4)
    mean, error = mean_and_error(worse.bits(worse.cond) - result.bits(result.cond))
    assert mean > 5 * error
