"""The mathematics knows no pictures: vectors and clouds of points are trained and sampled by the same loop, objective
and samplers, and end in the distributions that they were drawn from.
"""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from latentdiff.diffusion import noise
from latentdiff.diffusion.objective import DiffusionLoss
from latentdiff.diffusion.parametrization import denoiser
from latentdiff.diffusion.path import Straight, VariancePreserving
from latentdiff.diffusion.samplers import SAMPLERS
from latentdiff.diffusion.times import Times
from latentdiff.drawing.guided import network_of
from latentdiff.networks.conditions import Conditions
from latentdiff.networks.protocols import Backbone, Spec
from latentdiff.training.denoiser import DenoiserStage, Draws, Samples
from latentdiff.training.order import Order

from . import small

LABELS = 2
MEANS = {"vectors": np.array([[0.9, -0.6], [-0.7, 0.8]]), "points": np.array([[0.8, 0.0, -0.5], [-0.6, 0.7, 0.2]])}
DEVIATIONS = {"vectors": np.array([0.3, 0.5]), "points": np.array([0.25, 0.4, 0.6])}
SHAPES = {"vectors": (2,), "points": (16, 3)}
PATHS = {
    "variance preserving": (VariancePreserving.cosine(1000).zero_terminal_snr(), "v_prediction"),
    "straight": (Straight(), "flow"),
}


class Perceptron(nn.Module):
    """(x, t, label) -> like x, of x (B, D) or (B, N, D): each vector or point by itself, all of a row at one label."""

    dtype = torch.float32

    def __init__(self, width, T):
        super().__init__()
        torch.manual_seed(0)
        self.T, self.spec = T, Spec(width, width, reads={"labels": (LABELS,)})
        self.layers = nn.Sequential(
            *(nn.Linear(width + 7 + LABELS, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, width))
        )

    def forward(self, x, t, conditions):
        t = torch.as_tensor(t, dtype=torch.float32).expand(len(x))[:, None] / self.T
        angles = torch.cat([t, *(wave(np.pi * k * t) for k in (0.5, 1, 2) for wave in (torch.sin, torch.cos))], 1)
        beside = torch.cat([angles, conditions["labels"]], 1)
        beside = beside.reshape(len(x), *[1] * (x.ndim - 2), -1).expand(*x.shape[:-1], -1)
        return self.layers(torch.cat([x, beside], -1))

    @torch.no_grad()
    def predict(self, x, time, conditions):
        return self(x, time, conditions)


class Labelled:
    """Latents of known distributions by label; a dropped label is of all zeros."""

    def __init__(self, kind, count):
        rng = np.random.default_rng(0)
        self.labels = np.arange(count) % LABELS
        centre = MEANS[kind][self.labels].reshape(count, *[1] * (len(SHAPES[kind]) - 1), -1)
        values = centre + DEVIATIONS[kind] * rng.standard_normal((count, *SHAPES[kind]))
        self.values = torch.from_numpy(values).float()

    def shape(self, row):
        return tuple(self.values.shape[1:])

    def batch(self, keys, kept=None):
        rows = [row for row, _ in keys]
        if kept is None:
            return {"x0": self.values[rows]}
        one_hot = torch.eye(LABELS)[self.labels[rows]]
        return {"labels": one_hot * torch.tensor(kept)[:, None]}

    def moments(self, batch):
        return batch["x0"], torch.full_like(batch["x0"], -np.inf)

    def conditions(self, batch):
        return Conditions({"labels": batch["labels"]})


PAIRS = [
    ("vectors", "variance preserving"),
    pytest.param(("points", "straight"), marks=pytest.mark.slow),
    pytest.param(("vectors", "straight"), marks=pytest.mark.slow),
    pytest.param(("points", "variance preserving"), marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=PAIRS, ids=": ".join)
def trained(request, tmp_path_factory):
    kind, (path, prediction) = request.param[0], PATHS[request.param[1]]
    network, data = Perceptron(SHAPES[kind][-1], path.T), Labelled(kind, 2048)
    draws, order = Draws(0, Times(path), caption_dropout=0.1), Order(0, "training", [np.arange(2048)])
    samples = Samples(data, data, str)
    stage = DenoiserStage(network, {"network": network}, DiffusionLoss(path, prediction), samples, draws, order)
    settings = {"max_train_steps": 400, "train_batch_size": 128, "learning_rate": 4e-3, "checkpointing_steps": 400}
    small.run(tmp_path_factory.mktemp(kind), stage, **settings, ema_decay=0.99)
    return kind, network.eval(), path, prediction


def sampled(trained, sampler, label, count=600, steps=25):
    kind, network, path, prediction = trained
    assert isinstance(network, Backbone)
    labels = torch.eye(LABELS)[[label]].expand(count, -1)
    denoise = denoiser(network_of(network), prediction, Conditions({"labels": labels}))

    def draw(purpose, step=0):
        return torch.from_numpy(noise.normal((count, *SHAPES[kind]), 0, purpose, step=step))

    levels = path.levels(steps, "trailing")
    for step in SAMPLERS[sampler].walk(denoise, draw("start"), levels, partial(draw, "within"), path):
        x = step.x
    return x.reshape(-1, SHAPES[kind][-1]).numpy()


@pytest.mark.parametrize("sampler", ["ddim", "unipc", "heun", "ddpm", "euler_ancestral"])
def test_samples_are_of_the_distribution(trained, sampler):
    """The mean and the deviation of each coordinate under each label, within what so short a training leaves."""
    kind = trained[0]
    for label in range(LABELS):
        x = sampled(trained, sampler, label)
        np.testing.assert_allclose(x.mean(0), MEANS[kind][label], atol=0.1)
        np.testing.assert_allclose(x.std(0), DEVIATIONS[kind], rtol=0.25)


def test_the_labels_matter(trained):
    first, second = (sampled(trained, "ddim", label, steps=10) for label in range(LABELS))
    assert np.abs(first.mean(0) - second.mean(0)).max() > 1
