"""emoji-128: it is whole, small, readable by diffusers, says which words it does not know, and draws things."""

import numpy as np
import pytest
import torch

from latentdiff import LatentDiffusionPipeline
from latentdiff.data.sprites.color import main_color
from latentdiff.families.loading import included_model
from latentdiff.formats.folder import parameter_counts


@pytest.fixture(scope="module")
def model():
    return included_model("emoji-128")


@pytest.fixture(scope="module")
def pipe():
    return LatentDiffusionPipeline.from_pretrained("emoji-128", device="cpu", runtime="torch")


def test_small(model):
    files = [file for file in model.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 29_000_000
    assert {file.suffix for file in files} == {".json", ".safetensors", ".gz", ".md", ".txt"}
    assert parameter_counts(model).keys() == {"text_encoder", "unet", "vae"}


def test_equal_to_diffusers(pipe, model):
    """Same latents, Euler, 20 steps. Diffusers rounds times to whole numbers, which few pixels show."""
    from diffusers import StableDiffusionPipeline

    theirs = StableDiffusionPipeline.from_pretrained(model)
    theirs.set_progress_bar_config(disable=True)
    latents = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    settings = {"num_inference_steps": 20, "guidance_scale": 3.0}
    prompt = "a cat on a blue background"
    expected = theirs([prompt] * 2, latents=latents.clone(), output_type="np", **settings).images
    image = pipe(prompt, num_images_per_prompt=2, latents=latents, output_type="uint8", **settings).images
    difference = np.abs(image - 255 * expected)
    print(f"difference of 255: mean {difference.mean():.3f}, largest {difference.max():.1f}")
    assert difference.mean() < 0.5
    assert difference.max() < 16


def test_it_says_which_words_it_does_not_know(pipe):
    notes = {prompt: pipe(prompt, num_inference_steps=1, seed=0).notes for prompt in ("a cat", "a castle on a table")}
    assert notes == {
        "a cat": [],
        "a castle on a table": ["emoji-128 has seen only in captions of one thing: table (ping pong)"],
    }
    assert pipe("a submarine", num_inference_steps=1, seed=0).notes == ["emoji-128 has never seen: submarine"]


@pytest.mark.parametrize(
    ("thing", "color"),
    [("banana", "yellow"), ("tomato", "red"), ("pea pod", "green"), ("carrot", "orange"), ("chestnut", "brown")],
)
def test_things_have_their_colors(pipe, thing, color):
    """Of four pictures at least three have the thing's colour on white; by chance it would be one in eight."""
    pictures = pipe(f"a {thing} on a white background", num_images_per_prompt=4, seed=1, output_type="uint8").images
    assert sum(main_color(np.dstack([picture, visible(picture)])) == color for picture in pictures) >= 3


def visible(picture):
    """Where a picture is not white, as an alpha channel, uint8 (H, W)."""
    return np.where(picture.min(-1) < 230, np.uint8(255), np.uint8(0))
