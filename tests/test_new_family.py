"""A family of one file that the package does not know is trained, drawn, written and read by the package's code."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from latentdiff import LatentDiffusionPipeline, families
from latentdiff.core.errors import ConfigError, ModelError
from latentdiff.core.images import to_images
from latentdiff.diffusion.objective import DiffusionLoss
from latentdiff.diffusion.path import Straight
from latentdiff.diffusion.times import Times
from latentdiff.families.loading import save_model
from latentdiff.model import ModelCard
from latentdiff.networks.conditions import Conditions
from latentdiff.training.denoiser import DenoiserStage, Draws, Samples
from latentdiff.training.order import Order

from . import digits, small


def glyph(digit):
    """A digit in white on black, uint8 (16, 16, 3)."""
    image = Image.new("RGB", (digits.SIDE, digits.SIDE))
    ImageDraw.Draw(image).text((4, 0), str(digit), fill="white", font=ImageFont.load_default(14))
    return np.asarray(image)


class Glyphs:
    """The ten digits."""

    def __init__(self):
        self.labels = torch.arange(digits.CLASSES)
        pictures = [glyph(digit) for digit in range(digits.CLASSES)]
        self.images = to_images(np.stack(pictures))

    def shape(self, row):
        return tuple(self.images.shape[1:])

    def batch(self, keys, kept=None):
        rows = [row for row, _ in keys]
        if kept is None:
            return {"x0": self.images[rows]}
        return {"label": torch.where(torch.tensor(kept), self.labels[rows], digits.CLASSES)[:, None]}

    def moments(self, batch):
        return batch["x0"], torch.full_like(batch["x0"], -np.inf)

    def conditions(self, batch):
        return Conditions({"label": batch["label"]})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """200 steps on a straight path, written as a folder of the family."""
    place, path, data = tmp_path_factory.mktemp("digits"), Straight(), Glyphs()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = digits.DiT.create()
    draws, order = Draws(0, Times(path), caption_dropout=0.1), Order(0, "training", [np.arange(len(data.images))])
    samples = Samples(data, data, str)
    stage = DenoiserStage(network, {"transformer": network}, DiffusionLoss(path, "flow"), samples, draws, order)
    settings = {"max_train_steps": 200, "train_batch_size": 60, "learning_rate": 3e-3, "checkpointing_steps": 200}
    small.run(place / "run", stage, **settings, ema_decay=0.95)
    defaults = {"sampler": "euler", "spacing": "trailing", "num_inference_steps": 20, "guidance_scale": 2.0}
    card = ModelCard("digits", size=(digits.SIDE, digits.SIDE), defaults=defaults)
    save_model(digits.assembled(network.eval(), path, "flow", card), place / "model")
    return place / "model"


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, digits.FAMILY))


def test_a_folder_of_an_unknown_family_is_refused(folder):
    with pytest.raises(ModelError, match="DigitPipeline is not supported"):
        LatentDiffusionPipeline.from_pretrained(folder)


def test_what_was_learnt_is_drawn(known, folder, tmp_path):
    """Read from the folder, guided, by the pipeline: most digits are nearest to their own glyph."""
    pipe = LatentDiffusionPipeline.from_pretrained(folder, device="cpu")
    assert (pipe.model.family, pipe.card.name, pipe.card.size) == (digits.FAMILY, "digits", (16, 16))
    prompts = [str(digit) for digit in range(digits.CLASSES)] * 4
    picture = pipe(prompts, seed=1, output_type="np").images
    glyphs = np.stack([glyph(digit) for digit in range(digits.CLASSES)]) / 255
    apart = ((picture[:, None] - glyphs[None]) ** 2).mean((2, 3, 4))
    right = apart.argmin(1) == np.tile(np.arange(digits.CLASSES), 4)
    assert right.mean() > 0.8, "of chance 0.1"
    pipe.save_pretrained(tmp_path / "again")
    again = LatentDiffusionPipeline.from_pretrained(tmp_path / "again", device="cpu")
    assert np.array_equal(again(prompts, seed=1, output_type="np").images, picture)


def test_its_own_rules_hold(known, folder):
    pipe = LatentDiffusionPipeline.from_pretrained(folder, device="cpu")
    with pytest.raises(ConfigError, match="prompt must be a digit"):
        pipe("a cat")
    with pytest.raises(ConfigError, match="width must be a multiple of 4"):
        pipe("3", width=65)
    with pytest.raises(ConfigError, match="pag_scale requires self-attention"):
        pipe("3", pag_scale=2.0)
