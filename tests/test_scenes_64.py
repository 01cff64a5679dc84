"""The model inside the package: it is whole, small, readable by diffusers, and draws what it is asked for."""

import numpy as np
import pytest
import torch

from latentdiff import LatentDiffusionPipeline
from latentdiff.core.images import to_images
from latentdiff.data import scenes
from latentdiff.diffusion import noise
from latentdiff.evaluation import oracle
from latentdiff.evaluation.composition import ceiling, evaluate_composition
from latentdiff.families.loading import included_model
from latentdiff.families.weights import load_clip, load_text_encoder, load_tokenizer
from latentdiff.formats.folder import parameter_counts
from latentdiff.networks.encoders.clip import clip_tokenizer, tokenize

PROMPT = "a red circle above a blue square"


@pytest.fixture(scope="module")
def model():
    return included_model("scenes-64")


@pytest.fixture(scope="module")
def pipe():
    return LatentDiffusionPipeline.from_pretrained("scenes-64", device="cpu", runtime="torch")


def test_small(model):
    files = [file for file in model.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 42_000_000
    assert {file.suffix for file in files} == {".json", ".safetensors", ".gz", ".md", ".txt"}
    assert parameter_counts(model).keys() == {"clip", "text_encoder", "unet", "vae"}


def test_equal_to_diffusers(pipe, model):
    """Same latents, DDIM, 20 steps: at most one of 255 values apart, which is rounding."""
    from diffusers import StableDiffusionPipeline

    theirs = StableDiffusionPipeline.from_pretrained(model)
    theirs.set_progress_bar_config(disable=True)
    latents = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    settings = {"num_inference_steps": 20, "guidance_scale": 3.0}
    expected = theirs([PROMPT] * 4, latents=latents.clone(), output_type="np", **settings).images
    image = pipe(
        PROMPT,
        num_images_per_prompt=4,
        latents=latents,
        sampler="ddim",
        spacing="trailing",
        output_type="uint8",
        **settings,
    ).images
    assert np.abs(image.astype(int) - (expected * 255).round()).max() <= 1


def test_draws_what_it_is_asked_for(pipe):
    """Six pictures of which at least four satisfy the prompt: chance is far below one in a hundred."""
    wanted = scenes.Description("position", (scenes.Group("circle", "red"), scenes.Group("square", "blue")), "above")
    pictures = pipe(PROMPT, num_images_per_prompt=6, seed=1, output_type="uint8").images
    assert sum(oracle.satisfies(oracle.read(picture), wanted) for picture in pictures) >= 4


def test_the_autoencoder_loses_nothing_the_oracle_reads(pipe):
    assert ceiling(pipe.model, pictures=16, seed=1).overall >= 0.99


@torch.no_grad()
def test_its_clip_knows_pictures_by_their_captions(model):
    """Of 64 captions the right one is most similar for a third of the pictures; chance is 1 in 64."""
    clip, tokenizer = load_clip(model), load_text_encoder(model).tokenizer
    chosen = [scenes.scene(noise.generator(5, "clip test", index)) for index in range(64)]
    images = to_images(np.stack([scenes.render(scene) for scene in chosen]))
    image_features, text_features, _ = clip(images, tokenize(tokenizer, [scene.caption for scene in chosen]))
    result = (image_features @ text_features.T).argmax(1) == torch.arange(64)
    assert float(result.float().mean()) > 1 / 3


@pytest.mark.slow
def test_composition(pipe):
    assert evaluate_composition(pipe.painter, pictures=48, seed=1).overall > 0.8


def test_its_vocabulary_has_clips_tokens_of_known_words(model):
    """The table holds only those; a caption of the training set has the tokens that CLIP's vocabulary gives it."""
    narrow, whole = load_tokenizer(model), clip_tokenizer(32)
    assert len(narrow) < 700
    captions = [scenes.scene(noise.generator(6, "vocabulary test", index)).caption for index in range(100)]
    assert [narrow.tokenize(text) for text in captions] == [whole.tokenize(text) for text in captions]
    assert narrow.tokenize("cat") == ["c", "at</w>"]
