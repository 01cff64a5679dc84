"""Editing by instruction (Brooks et al. 2023): the pictures are those of diffusers' pipeline."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image

from latentdiff.core.errors import ConfigError
from latentdiff.diffusion import guidance
from latentdiff.diffusion.level import NoiseLevel

from . import stable_diffusion
from .stable_diffusion import load, openvino_like_torch

PROMPT, NEGATIVE = "make it snow", "blurry"
OURS = {"sampler": "ddim", "spacing": "trailing"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("editing") / "model"
    base = stable_diffusion.pipeline("1")
    with torch.random.fork_rng():
        torch.manual_seed(4)
        unet = stable_diffusion.unet("1", True, in_channels=8)
    parts = {**base.components, "unet": unet}
    made = StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    made.save_pretrained(folder)
    return folder, made


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8))


def noise(rows=1):
    return torch.randn(rows, 4, 6, 8, generator=torch.Generator().manual_seed(3))


def test_guidance_of_text_and_image():
    """A closed form: with equal scales it is plain guidance from nothing; with both 1 it is the conditional."""
    x, level = np.ones((1, 1, 2, 2)), NoiseLevel(5, 0.6, 0.8)
    both = lambda x, level: (2 * x, 5 * x)  # noqa: E731
    free = lambda x, level: -1 * x  # noqa: E731
    for text, image, expected in ((1, 1, 5), (3, 3, 17), (7.5, 1.5, -1 + 1.5 * 3 + 7.5 * 3), (0, 1, 2)):
        sample = guidance.of_text_and_image(both, free, text, image)(x, level)
        assert np.allclose(sample, expected)


SETTINGS = {
    "plain": {},
    "by the picture": {"image_guidance_scale": 3.0},
    "unguided": {"guidance_scale": 1.0},
    "with a negative prompt": {"negative_prompt": NEGATIVE},
    "one step": {"num_inference_steps": 1},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_as_diffusers_draws(place, picture, settings):
    folder, theirs = place
    options = {"num_inference_steps": 4, "guidance_scale": 6.0, "image": picture, "latents": noise(), **settings}
    expected = theirs(PROMPT, output_type="np", **options).images
    sample = load(folder)(PROMPT, output_type="np", **options, **OURS).images
    assert np.abs(sample - expected).max() < 1e-4


@pytest.mark.slow
def test_openvino_draws_what_torch_draws(place, picture, tmp_path):
    folder, _ = place
    openvino_like_torch(folder, tmp_path, PROMPT, image=picture, **OURS)


def test_saved_as_it_was(place, picture, tmp_path):
    folder, _ = place
    load(folder).save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "model_index.json").read_text())["_class_name"] == (
        "StableDiffusionInstructPix2PixPipeline"
    )
    again = StableDiffusionInstructPix2PixPipeline.from_pretrained(tmp_path / "saved")
    assert again.unet.config.in_channels == 8
    options = {"num_inference_steps": 2, "image": picture, "seed": 2, "output_type": "uint8"}
    assert (load(tmp_path / "saved")(PROMPT, **options).images == load(folder)(PROMPT, **options).images).all()


def test_refusals(place, picture, tmp_path):
    folder, _ = place
    pipe = load(folder)
    with pytest.raises(ConfigError, match="this model edits a picture: give one"):
        pipe(PROMPT, num_inference_steps=2)
    with pytest.raises(ConfigError, match="image_guidance_scale"):
        pipe(PROMPT, image=picture, image_guidance_scale=0.5)
    with pytest.raises(ConfigError, match="apg does not apply"):
        pipe(PROMPT, image=picture, apg=True)
    stable_diffusion.pipeline("1").save_pretrained(tmp_path / "plain")
    with pytest.raises(ConfigError, match="image_guidance_scale requires a model that edits"):
        load(tmp_path / "plain")(PROMPT, image=picture, image_guidance_scale=2.0)
