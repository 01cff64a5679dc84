"""Flux.1, dev and schnell: it draws what diffusers' pipeline draws of the same folder, and loads there when saved."""

import json

import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline, FluxPipeline
from PIL import Image

from latentdiff.core.errors import ConfigError
from latentdiff.drawing.record import read_metadata
from latentdiff.networks.backbones.flux import packed, unpacked
from latentdiff.networks.encoders.prompt import Prompt

from . import flux
from .pictures import as_jsonl, some_pictures
from .stable_diffusion import load

PROMPT = "a castle on the hill"


@pytest.fixture(scope="module", params=[True, False], ids=["dev", "schnell"])
def folder(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("flux") / ("dev" if request.param else "schnell")
    flux.pipeline(request.param).save_pretrained(place)
    return place


def theirs(folder):
    pipe = FluxPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(height=8, width=8):
    return torch.randn(1, 16, height, width, generator=torch.Generator().manual_seed(1))


def test_packing_is_that_of_diffusers():
    x = noise(8, 12)
    tokens = FluxPipeline._pack_latents(x, 1, 16, 8, 12)
    assert torch.equal(packed(x), tokens)
    assert torch.equal(unpacked(tokens, 4, 6), x)


def test_what_has_no_effect_is_refused(folder):
    """CLIP's hidden states are not read; a preset does not change the guidance that dev reads."""
    pipe = load(folder)
    with pytest.raises(ConfigError, match="clip_skip has no effect on this model"):
        pipe(PROMPT, clip_skip=1, num_inference_steps=1, width=64, height=64)
    scale = "true_cfg_scale" if "dev" in folder.name else "guidance_scale"
    out = pipe(PROMPT, negative_prompt="red", num_inference_steps=1, width=64, height=64)
    assert f"the negative prompt has no effect: it requires {scale} over 1" in out.notes
    with pytest.raises(ConfigError, match=f"apg requires {scale} over 1"):
        pipe.request(PROMPT, apg=True, **{scale: 1.0})
    assert pipe.request(PROMPT, apg=True, **{scale: 2.0}).apg
    expected = 3.5 if "dev" in folder.name else 1.0
    assert pipe.request(PROMPT, preset="hyper").guidance_scale == expected


@pytest.mark.quick("dev-settings0", "dev-settings3", "schnell-settings1", "schnell-settings2")
@pytest.mark.parametrize(
    "settings",
    [
        {"guidance_scale": 3.5},
        {"guidance_scale": 1.5, "width": 96, "height": 64},
        {"guidance_scale": 6.0, "width": 256, "height": 320},
        {"guidance_scale": 2.0, "true_cfg_scale": 3.0, "negative_prompt": "blurry red"},
    ],
)
def test_pictures_are_those_of_diffusers(folder, settings):
    """To rounding, for the same noise; dev reads the guidance, and schnell has none."""
    settings = {"num_inference_steps": 4, "width": 64, "height": 64, **settings}
    height, width = settings["height"] // 8, settings["width"] // 8
    x = noise(height, width)
    own = dict(settings)
    if "dev" not in folder.name:
        own |= {"guidance_scale": own.pop("true_cfg_scale", 1.0)}
    expected = theirs(folder)(PROMPT, latents=packed(x), output_type="latent", **settings).images
    ours = load(folder)
    for given in (x, packed(x)):  # tokens are latents too, as diffusers takes and returns them
        sample = ours(PROMPT, latents=given, output_type="latent", **own).images
        torch.testing.assert_close(sample, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="latents must have the shape"):
        ours(PROMPT, latents=packed(x)[:, 1:], **own)
    view = theirs(folder)(PROMPT, latents=packed(x), output_type="pt", **settings).images
    torch.testing.assert_close(ours(PROMPT, latents=x, output_type="pt", **own).images, view, rtol=1e-4, atol=1e-4)


def test_defaults_and_sizes(folder):
    pipe = load(folder)
    request = pipe.request(PROMPT, seed=0)
    usual = (28, 3.5) if folder.name == "dev" else (4, 1.0)
    assert (request.num_inference_steps, request.guidance_scale) == usual
    assert (request.sampler, request.spacing) == ("euler", "trailing")
    assert (pipe.card.size, pipe.model.multiple) == ((1024, 1024), 16)
    with pytest.raises(ConfigError, match="multiple of 16"):
        pipe(PROMPT, width=40, height=64)


def test_conditions_are_those_of_diffusers(folder):
    tokens, pooled, _ = theirs(folder).encode_prompt(PROMPT, None)
    ours = load(folder).model.encoder.encode(Prompt(PROMPT))
    torch.testing.assert_close(ours["tokens"], tokens[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours["pooled"], pooled[0], rtol=1e-5, atol=1e-5)


def test_guidance_that_has_no_effect_is_refused(folder):
    pipe = load(folder)
    if folder.name == "schnell":
        with pytest.raises(ConfigError, match="true_cfg_scale requires a model that reads its guidance"):
            pipe(PROMPT, width=64, height=64, true_cfg_scale=2.0)
        return
    settings = {"width": 64, "height": 64, "num_inference_steps": 2, "seed": 1, "output_type": "latent"}
    low, high = (pipe(PROMPT, guidance_scale=scale, **settings).images for scale in (1.5, 4.0))
    assert not torch.equal(low, high)
    both = pipe(PROMPT, guidance_scale=4.0, num_images_per_prompt=2, **settings).images
    torch.testing.assert_close(both[:1], high, rtol=1e-4, atol=1e-5)


def test_saved_folders_load_in_diffusers(folder, tmp_path):
    pipe = load(folder)
    pipe.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert (index["_class_name"], index["scheduler"][1]) == ("FluxPipeline", "FlowMatchEulerDiscreteScheduler")
    again = load(tmp_path / "saved")
    assert (again.card.hash, again.model.path) == (pipe.card.hash, pipe.model.path)
    settings = {"output_type": "latent", "num_inference_steps": 2, "width": 64, "height": 64, "guidance_scale": 2.0}
    expected = theirs(folder)(PROMPT, latents=packed(noise()), **settings).images
    saved = theirs(tmp_path / "saved")(PROMPT, latents=packed(noise()), **settings).images
    torch.testing.assert_close(saved, expected)


def test_by_the_command_line(folder, call, tmp_path):
    words = ("generate", PROMPT, "-m", folder, "-W", 64, "-H", 64, "--steps", 2, "-s", 1, "-o", tmp_path / "out")
    assert call(*words)[0] == 0
    (path,) = (tmp_path / "out").iterdir()
    record = read_metadata(path)["latentdiff"]
    assert record["request"]["num_inference_steps"] == 2
    code, out, _ = call("reproduce", path, "--model", folder)
    assert (code, "equal: all" in out) == (0, True)


# --- Kontext ---


@pytest.fixture(scope="module")
def kontext(tmp_path_factory):
    """The networks of dev, as an editing pipeline."""
    place = tmp_path_factory.mktemp("flux") / "kontext"
    FluxKontextPipeline(**flux.pipeline().components).save_pretrained(place)
    return place


def picture(height=64, width=64):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8))


@pytest.mark.quick("settings2")
@pytest.mark.parametrize(
    "settings",
    [
        {"num_inference_steps": 1},
        {"num_inference_steps": 4, "width": 96},
        {"num_inference_steps": 4, "true_cfg_scale": 3.0, "negative_prompt": "blurry red", "guidance_scale": 2.0},
    ],
)
def test_kontext_edits_as_diffusers_does(kontext, settings):
    """The picture is read beside the noise; drawing begins at noise, and a strength is not needed."""
    settings = {"width": 64, "height": 64, **settings}
    x, image = noise(settings["height"] // 8, settings["width"] // 8), picture(settings["height"], settings["width"])
    pipe = FluxKontextPipeline.from_pretrained(kontext)
    pipe.set_progress_bar_config(disable=True)
    area = {"max_area": settings["width"] * settings["height"], "_auto_resize": False}
    expected = pipe(image, PROMPT, latents=packed(x), output_type="pt", **settings, **area).images
    ours = load(kontext)
    own = {key: value for key, value in settings.items() if key not in ("width", "height")}
    sample = ours(PROMPT, image=image, latents=x, output_type="pt", **own).images
    torch.testing.assert_close(sample, expected, rtol=1e-4, atol=1e-4)
    without = pipe(None, PROMPT, latents=packed(x), output_type="pt", **settings, **area).images
    plain = ours(PROMPT, latents=x, output_type="pt", **settings).images
    torch.testing.assert_close(plain, without, rtol=1e-4, atol=1e-4)
    assert (plain - sample).abs().max() > 0.01


def test_kontext_keeps_what_is_not_masked(kontext):
    mask = Image.fromarray(np.pad(np.full((64, 32), 255, np.uint8), ((0, 0), (32, 0))))
    options = {"image": picture(), "mask_image": mask, "num_inference_steps": 2, "seed": 1, "output_type": "np"}
    sample = load(kontext)(PROMPT, **options).images[0]
    before = np.asarray(picture(), np.float32) / 255
    np.testing.assert_allclose(sample[:, :32], before[:, :32], atol=1 / 255)
    assert np.abs(sample[:, 32:] - before[:, 32:]).max() > 0.1


@pytest.mark.slow
def test_kontext_saved_and_refused(kontext, call, tmp_path):
    pipe = load(kontext)
    pipe.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "model_index.json").read_text())["_class_name"] == "FluxKontextPipeline"
    assert load(tmp_path / "saved").model.edits
    picture().save(tmp_path / "before.png")
    words = ("generate", PROMPT, "-m", kontext, "--image", tmp_path / "before.png", "--steps", 2, "-s", 1)
    assert call(*words, "-o", tmp_path / "after.png")[0] == 0
    code, out, _ = call("reproduce", tmp_path / "after.png", "--model", kontext)
    assert (code, "equal: all" in out) == (0, True)
    as_jsonl(tmp_path / "data", some_pictures(4))
    code, _, err = call("finetune", kontext, tmp_path / "data", "-o", tmp_path / "run", "--resolution", 64)
    assert (code, "fine-tuning an editing model is not supported" in err) == (2, True), err
