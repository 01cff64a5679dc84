"""Stages small enough that a test trains them in a blink, with all that a run needs of a stage."""

import json

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from latentdiff.diffusion.objective import DiffusionLoss
from latentdiff.diffusion.path import Straight, VariancePreserving
from latentdiff.diffusion.times import Times
from latentdiff.networks.conditions import Conditions
from latentdiff.settings.config import Training
from latentdiff.training.denoiser import DenoiserStage, Draws, Samples
from latentdiff.training.interruption import Interruption
from latentdiff.training.order import Order
from latentdiff.training.run import Origin, run_stage

SD = VariancePreserving.scaled_linear()


class LineStage:
    """y = 2 x + 1 from noisy inputs, each a function of its position."""

    divisible = True

    def __init__(self):
        torch.manual_seed(0)
        self.module = nn.Linear(1, 1)
        self.parts = {"line": self.module}

    def batch(self, positions):
        x = [torch.randn(1, generator=torch.Generator().manual_seed(position)) for position in positions]
        return {"x": torch.stack(x), "y": 2 * torch.stack(x) + 1}

    def loss(self, module, batch):
        return ((module(batch["x"]) - batch["y"]) ** 2).flatten(1).mean(1)

    def sample_ids(self, positions):
        return [f"point {position}" for position in positions]


class PictureStage(LineStage):
    """A convolution between two matrices, in channels_last: every layout and kind that an optimizer treats apart."""

    def __init__(self):
        torch.manual_seed(0)
        layers = nn.Linear(8, 72), nn.Unflatten(1, (8, 3, 3)), nn.Conv2d(8, 4, 2), nn.Conv2d(4, 8, 2), nn.Flatten()
        self.module = nn.Sequential(*layers).to(memory_format=torch.channels_last)
        self.parts = {"network": self.module}

    def batch(self, positions):
        x = [torch.randn(8, generator=torch.Generator().manual_seed(position)) for position in positions]
        return {"x": torch.stack(x), "y": torch.stack(x).flip(1)}


class TinyNetwork(nn.Module):
    """x, t, conditions -> like x; enough of a U-Net to have gradients everywhere."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.context = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(3, 4)

    def forward(self, x, t, conditions):
        shift = self.context(conditions["tokens"].float()).mean(1) + t[:, None] / 1000
        return self.conv(x) * (1 + shift[:, :, None, None])


class FixedRows:
    """Latents and conditions that a test gives, row by row; a dropped caption's condition is 99."""

    def __init__(self, mean, log_variance):
        self.mean, self.log_variance = mean, log_variance

    def shape(self, row):
        return tuple(self.mean.shape[1:])

    def batch(self, keys, kept=None):
        rows = torch.tensor([row for row, _ in keys])
        if kept is not None:
            texts = torch.where(torch.tensor(kept), rows, 99).float()
            return {"texts": texts[:, None, None].expand(-1, 1, 3).contiguous()}
        return {"mean": self.mean[rows], "log_variance": self.log_variance[rows]}

    def moments(self, batch):
        return batch["mean"].float(), batch["log_variance"].float()

    def conditions(self, batch):
        return Conditions({"tokens": batch["texts"]})


def denoiser_stage(count=10, network=None, buckets=None, group=1, bins=0, path=SD, **draws):
    """The real stage on `count` random latents."""
    generator = torch.Generator().manual_seed(0)
    store = FixedRows(
        torch.randn(count, 4, 2, 2, generator=generator).half(), torch.full((count, 4, 2, 2), -2.0).half()
    )
    network = network or TinyNetwork()
    loss = DiffusionLoss(path, "flow" if isinstance(path, Straight) else "epsilon")
    picture = Draws(0, Times(path, bins=bins), **draws)
    order = Order(0, picture.purpose, buckets or [np.arange(count)], group)
    samples = Samples(store, store, lambda row: f"picture {row}")
    return DenoiserStage(network, {"unet": network}, loss, samples, picture, order)


SETTINGS = Training(
    max_train_steps=40,
    train_batch_size=8,
    learning_rate=0.1,
    lr_warmup_steps=5,
    weight_decay=0,
    checkpointing_steps=10,
    ema_decay=0.9,
)


def run(directory, stage=None, report=None, checkpoint=None, signals=False, identity=None, **changes):
    """Train; the stage with averaged weights in its module."""
    stage = stage or LineStage()
    settings = SETTINGS.model_copy(update=changes)
    start = Origin(checkpoint, identity)
    accelerator = Accelerator(cpu=True)
    if signals:
        with Interruption() as interruption:
            run_stage(accelerator, stage, settings, directory, report, start, interruption)
    else:
        run_stage(accelerator, stage, settings, directory, report, start)
    return stage


def logged(directory):
    """Every line of a run's log."""
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
