"""Stable Diffusion 3: it draws what diffusers' pipeline draws, of the same folder, and what is saved loads there."""

import json

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from latentdiff.core.errors import ConfigError, ModelError, UnsafeError
from latentdiff.diffusion.path import Straight
from latentdiff.networks.encoders.prompt import Prompt, Style

from . import stable_diffusion_3
from .stable_diffusion import load

PROMPT = "a castle on the hill"


@pytest.fixture(scope="module", params=[True, False], ids=["with T5", "without T5"])
def folder(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("sd3") / "model"
    stable_diffusion_3.pipeline(request.param).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    place = tmp_path_factory.mktemp("sd3") / "whole"
    stable_diffusion_3.pipeline().save_pretrained(place)
    return place


def theirs(folder):
    absent = {} if (folder / "text_encoder_3").is_dir() else {"text_encoder_3": None, "tokenizer_3": None}
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 7, 28])
def test_the_grid_is_that_of_diffusers(shift, steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    levels = Straight(shift).levels(steps, "linspace")
    np.testing.assert_allclose([level.sigma for level in levels], scheduler.sigmas, rtol=1e-6, atol=1e-7)


@pytest.mark.quick("with T5-settings0", "with T5-settings2", "without T5-settings1", "without T5-settings3")
@pytest.mark.parametrize(
    "settings",
    [
        {"guidance_scale": 5.0, "negative_prompt": "blurry"},
        {"guidance_scale": 1.0},
        {"guidance_scale": 4.0, "width": 96, "height": 64, "clip_skip": 1},
        {"guidance_scale": 4.0, "prompt": ""},
    ],
)
def test_latents_are_those_of_diffusers(folder, settings):
    """To rounding, for the same noise."""
    settings = {"prompt": PROMPT, "num_inference_steps": 4, "width": 64, "height": 64, **settings}
    noise = torch.randn(
        1, 16, settings["height"] // 8, settings["width"] // 8, generator=torch.Generator().manual_seed(1)
    )
    expected = theirs(folder)(latents=noise, output_type="latent", **settings).images
    ours = load(folder)
    picture = ours(latents=noise, output_type="latent", **settings).images
    torch.testing.assert_close(picture, expected, rtol=1e-4, atol=1e-4)
    again = ours(latents=noise, output_type="pt", **settings).images
    view = theirs(folder)(latents=noise, output_type="pt", **settings).images
    torch.testing.assert_close(again, view, rtol=1e-4, atol=1e-4)


def test_the_defaults_are_those_of_its_pipeline(whole):
    pipe = load(whole)
    request = pipe.request(PROMPT, seed=0)
    assert (request.num_inference_steps, request.guidance_scale, request.sampler) == (28, 7.0, "euler")
    assert request.spacing == "linspace"
    assert pipe.card.size == (64, 64)
    assert pipe.model.multiple == 16
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = theirs(whole)(PROMPT, latents=noise, output_type="latent", width=64, height=64).images
    torch.testing.assert_close(pipe(PROMPT, latents=noise, output_type="latent").images, expected, rtol=1e-3, atol=1e-3)


def test_conditions_are_those_of_diffusers(folder):
    tokens, _, pooled, _ = theirs(folder).encode_prompt(PROMPT, None, None, do_classifier_free_guidance=False)
    ours = load(folder).model.encoder.encode(Prompt(PROMPT))
    torch.testing.assert_close(ours["tokens"], tokens[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours["pooled"], pooled[0], rtol=1e-5, atol=1e-5)


def test_weights_of_words_in_t5(whole):
    """The tokens of a word are w times as far from the empty prompt's, in T5 as in CLIP; weight 1 changes no bit."""
    t5 = load(whole).model.encoder.third
    plain, empty = t5.encode(Prompt(PROMPT)), t5.encode(Prompt(""))
    assert torch.equal(t5.encode(Prompt("a (castle:1.0) on the hill")), plain)
    heavy = t5.encode(Prompt("a (castle:1.5) on the hill"))
    place = t5.tokenizer.convert_ids_to_tokens(t5.tokenizer(PROMPT).input_ids).index("▁castle")
    expected = plain.clone()
    expected[place] = empty[place] + 1.5 * (plain[place] - empty[place])
    torch.testing.assert_close(heavy, expected)
    brackets = t5.encode(Prompt("a (castle:1.5) on the hill", Style(weights=False)))
    assert not torch.equal(brackets, heavy)


def test_long_prompts(whole):
    """CLIP reads chunks, T5 at most 256 tokens, which a note says."""
    pipe = load(whole)
    long = "a castle on the hill " * 100
    notes = pipe(long, num_inference_steps=1).notes
    assert any("T5 does not read its last 245 tokens" in note for note in notes)
    conditions = pipe.model.encoder.encode(Prompt(long, chunks=7))
    assert conditions["tokens"].shape == (7 * 77 + 256, 128)


@pytest.mark.slow
def test_saved_folders_load_in_diffusers(folder, tmp_path):
    """The same weights, the same index, the same picture."""
    pipe = load(folder)
    pipe.save_pretrained(tmp_path / "saved")
    index, saved = (json.loads((place / "model_index.json").read_text()) for place in (folder, tmp_path / "saved"))
    for name in ("_class_name", "transformer", "text_encoder", "text_encoder_3", "scheduler"):
        assert saved[name] == index[name]
    assert load(tmp_path / "saved").card.hash == pipe.card.hash
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    settings = {"latents": noise, "output_type": "latent", "num_inference_steps": 2, "width": 64, "height": 64}
    expected = theirs(folder)(PROMPT, **settings).images
    torch.testing.assert_close(theirs(tmp_path / "saved")(PROMPT, **settings).images, expected)


def test_from_a_picture_with_a_mask_and_from_its_record(whole, tmp_path):
    """Kept pixels stay, sides that are no multiples are padded, and a picture's record draws it again."""
    pipe = load(whole)
    photo = np.random.default_rng(0).integers(0, 256, (70, 64, 3), np.uint8)
    mask = np.zeros((70, 64), np.uint8)
    mask[20:40] = 255
    (picture,) = pipe(PROMPT, image=photo, mask_image=mask, num_inference_steps=3, seed=1, output_type="uint8").images
    assert np.array_equal(picture[mask == 0], photo[mask == 0])
    assert not np.array_equal(picture[mask == 255], photo[mask == 255])
    out = pipe(PROMPT, num_inference_steps=2, seed=3)
    out.save(tmp_path)
    from latentdiff.drawing.reproduce import reproduce

    _, likeness = reproduce(next(tmp_path.glob("*.png")), type(pipe).from_pretrained, model=whole, device="cpu")
    assert likeness.equal


def test_a_picture_alone_and_in_a_batch(whole):
    pipe = load(whole)
    together = pipe(PROMPT, num_inference_steps=2, seed=5, num_images_per_prompt=3, output_type="pt").images
    alone = pipe(PROMPT, num_inference_steps=2, seed=7, output_type="pt").images
    torch.testing.assert_close(together[2], alone[0], rtol=1e-4, atol=1e-5)


def test_what_is_refused(whole, tmp_path):
    pipe = load(whole)
    with pytest.raises(ConfigError, match="multiple of 16"):
        pipe(PROMPT, width=72)
    with pytest.raises(ConfigError, match="sides must be at most 192 for this model"):
        pipe(PROMPT, width=208)
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(whole, broken)
    config = json.loads((broken / "transformer" / "config.json").read_text())
    (broken / "transformer" / "config.json").write_text(json.dumps({**config, "pooled_projection_dim": 8}))
    with pytest.raises(ModelError, match=r"cannot load transformer .*linear_1\.weight expected shape"):
        load(broken)
    index = json.loads((whole / "model_index.json").read_text())
    (broken / "model_index.json").write_text(json.dumps({**index, "text_encoder_3": ["transformers", "Evil"]}))
    with pytest.raises(UnsafeError, match="unknown class Evil"):
        load(broken)
