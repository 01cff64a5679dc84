"""The denoiser's batches: keyed draws, epochs, dropped captions, the posterior, what is added to the noise."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from latentdiff.diffusion.path import Straight, VariancePreserving
from latentdiff.diffusion.times import Times
from latentdiff.training.denoiser import Draws, thaw, validation_losses

from .small import SD, denoiser_stage


def test_batches_do_not_depend_on_their_size():
    """The same samples with the same noise, times and dropped captions, in the same order."""
    wide = denoiser_stage(caption_dropout=0.25).batch(range(12, 18))
    narrow = [denoiser_stage(caption_dropout=0.25).batch(part) for part in (range(12, 13), range(13, 18))]
    for name, part in wide.items():
        assert torch.equal(part, torch.cat([batch[name] for batch in narrow])), name


def test_every_sample_once_an_epoch_with_new_noise():
    stage = denoiser_stage()
    epochs = [stage.batch(range(10 * epoch, 10 * epoch + 10)) for epoch in range(3)]
    rows = [epoch["rows"].tolist() for epoch in epochs]
    assert all(sorted(order) == list(range(10)) for order in rows)
    assert rows[0] != rows[1] != rows[2]
    noise = [epoch["noise"][np.argsort(order)] for epoch, order in zip(epochs, rows, strict=True)]
    assert not torch.isclose(noise[0], noise[1]).any()
    assert stage.sample_ids(range(10)) == [f"picture {row}" for row in rows[0]]


def test_caption_dropout_has_its_rate():
    stage = denoiser_stage(caption_dropout=0.25)
    batch = stage.batch(range(2000))
    dropped = batch["texts"].flatten(1).eq(99).all(1)
    assert float(dropped.float().mean()) == pytest.approx(0.25, abs=0.03)


def test_posterior_is_sampled():
    """x0 = mean + exp(log variance / 2) noise, seen by a network whose target is made of it."""
    stage = denoiser_stage()
    batch = stage.batch(range(400))
    seen = {}
    stage._diffusion_loss = lambda network, x0, *rest: seen.setdefault("x0", x0)
    stage.loss(None, batch)
    residual = seen["x0"] - stage._samples.latents.mean[batch["rows"]].float()
    torch.testing.assert_close(residual, float(np.exp(-1)) * batch["posterior"], rtol=1e-3, atol=1e-3)


def test_noise_offset_is_a_constant_of_each_channel():
    """Variance 1 + offset^2, of which offset^2 is shared by a channel's values; other draws stay as they are."""
    plain, offset = (denoiser_stage(noise_offset=value).batch(range(4000)) for value in (0.0, 0.5))
    added = offset["noise"] - plain["noise"]
    torch.testing.assert_close(added, added[..., :1, :1].expand_as(added))
    assert float(added.std()) == pytest.approx(0.5, rel=0.02)
    assert torch.equal(plain["posterior"], offset["posterior"])


def test_input_perturbation_is_no_target():
    """What the network is shown moves by sigma_t times the perturbation; the noise it must find does not."""
    seen = []

    class Seeing(nn.Module):
        def forward(self, x, t, context):
            seen.append(x)
            return torch.zeros_like(x)

    losses = []
    for strength in (0.0, 0.1):
        stage = denoiser_stage(network=Seeing(), input_perturbation=strength)
        batch = stage.batch(range(1000))
        losses.append(stage.loss(stage.module, batch))
    assert torch.equal(losses[0], losses[1])
    _, sigma = VariancePreserving.scaled_linear().scales(batch["t"].numpy())
    sigma = torch.from_numpy(sigma).float()[:, None, None, None]
    torch.testing.assert_close(seen[1] - seen[0], sigma * batch["perturbation"], rtol=1e-3, atol=1e-5)
    assert float(batch["perturbation"].std()) == pytest.approx(0.1, rel=0.02)


def test_bins_of_a_shifted_path_have_its_times():
    path = Straight(3.0)
    stage = denoiser_stage(purpose="validation", bins=4, path=path)
    edges = [0, 500, 750, 900, 1000]  # 3 s / (1 + 2 s) of a quarter, a half, three quarters
    for number in range(4):
        t = stage.batch_of([(row, number) for row in range(10)])["t"]
        assert ((t > edges[number]) & (t <= edges[number + 1])).all()
    names = [f"loss_at_{low}_to_{high - 1}" for low, high in pairwise(edges)]
    assert list(validation_losses(stage, 4, path, 10)) == ["validation_loss", *names]


def test_validation_is_by_bins_of_time_and_never_changes():
    """Every picture once in each bin, at a time of that bin; the same numbers twice, the mean of the bins in all."""
    stage = denoiser_stage(purpose="validation", bins=4)
    for number in range(4):
        assert (stage.batch_of([(row, number) for row in range(10)])["t"] // 250 == number).all()
    first, again = (validation_losses(stage, 4, SD, size) for size in (3, 10))
    assert first == pytest.approx(again, rel=1e-6)
    assert validation_losses(stage, 4, SD, 10) == again
    halves = denoiser_stage(
        purpose="validation", bins=4, buckets=[np.array([0, 3, 4]), np.array([1, 2, 5, 6, 7, 8, 9])]
    )
    assert validation_losses(halves, 4, SD, 10) == pytest.approx(again, rel=1e-6)
    bins = [f"loss_at_{low}_to_{low + 249}" for low in (0, 250, 500, 750)]
    assert list(first) == ["validation_loss", *bins]
    assert first["validation_loss"] == pytest.approx(np.mean([first[name] for name in bins]))


def test_latents_are_samples_or_means():
    picture, mean = denoiser_stage(), denoiser_stage(samples=False)
    batch = mean.batch_of([(row, 3) for row in range(10)])
    assert torch.equal(mean._x0(batch), batch["mean"].float())
    sampled = picture.batch_of([(row, 3) for row in range(10)])
    assert torch.equal(sampled["noise"], batch["noise"])
    apart = (picture._x0(sampled) - batch["mean"].float()).std()
    assert float(apart) == pytest.approx(math.exp(-1), rel=0.2), "the deviation of log-variance -2"


def test_times_are_uniform():
    draws = Draws(0, Times(VariancePreserving.scaled_linear()))
    t = np.array([draws.of(row, 0, (1, 1, 1))["t"] for row in range(5000)])
    assert (t.min(), t.max()) == (0, 999)
    assert np.histogram(t, 10, (0, 1000))[0] == pytest.approx(np.full(10, 500), abs=5 * 500**0.5)


def test_the_table_of_words_is_trained_if_the_vocabulary_is_the_captions():
    text_encoder = nn.ModuleDict({"token_embedding": nn.Linear(2, 2), "layer": nn.Linear(2, 2)})
    layer = {"layer.weight", "layer.bias"}
    for words, trained in ((False, layer), (True, layer | {"token_embedding.weight", "token_embedding.bias"})):
        thaw(text_encoder, words=words)
        assert {name for name, p in text_encoder.named_parameters() if p.requires_grad} == trained
