"""Stable Diffusion's upscaler: the pictures are those of diffusers' pipeline, with the same weights and noise."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionUpscalePipeline, UNet2DConditionModel
from PIL import Image

from latentdiff.core.errors import ConfigError, ModelError
from latentdiff.drawing.record import read_metadata

from . import stable_diffusion
from .pictures import as_jsonl, some_pictures
from .stable_diffusion import load, openvino_like_torch

PROMPT, NEGATIVE = "a castle on the hill", "blurry"
OURS = {"sampler": "ddim", "spacing": "trailing"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("upscaling") / "model"
    base = stable_diffusion.pipeline("2")
    with torch.random.fork_rng():
        torch.manual_seed(4)
        config = {key: value for key, value in stable_diffusion.unet("2", True).config.items() if key[0] != "_"}
        unet = UNet2DConditionModel(**config | {"in_channels": 7, "num_class_embeds": 1000})
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(32, 32, 64),
            latent_channels=4,
            scaling_factor=0.08333,
        )
    made = StableDiffusionUpscalePipeline(
        vae=vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        unet=unet,
        low_res_scheduler=DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.0001, beta_end=0.02),
        scheduler=DDIMScheduler(**stable_diffusion.SCHEDULE, prediction_type="v_prediction"),
    )
    made.set_progress_bar_config(disable=True)
    made.save_pretrained(folder)
    return folder, made


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8))


def test_as_diffusers_draws(place, picture):
    """With one generator, from which both draw the small picture's noise first."""
    folder, theirs = place
    ours = load(folder)
    sample = {}
    for level in (0, 20, 100):
        for guidance in (1.0, 5.0):
            options = {"num_inference_steps": 4, "noise_level": level, "guidance_scale": guidance, "image": picture}
            expected, own = (
                pipe(PROMPT, generator=torch.Generator().manual_seed(5), output_type="np", **options, **more).images
                for pipe, more in ((theirs, {}), (ours, OURS))
            )
            assert own.shape == (1, 48, 80, 3)
            assert np.abs(own - expected).max() < 1e-4
            sample[level, guidance] = own
    assert np.abs(sample[0, 5.0] - sample[100, 5.0]).max() > 1e-3, "the level has an effect"


def test_noise_is_keyed_by_the_picture(place, picture):
    """A picture does not depend on its batch, and is drawn again from its record."""
    folder, _ = place
    options = {"num_inference_steps": 2, "image": picture, "output_type": "uint8"}
    ours = load(folder)
    four = ours(PROMPT, seed=3, num_images_per_prompt=4, batch_size=3, **options).images
    alone = ours(PROMPT, seed=5, **options).images
    assert np.abs(four[2].astype(int) - alone[0]).max() <= 1
    assert (ours(PROMPT, seed=5, **options).images == alone).all()


@pytest.mark.slow
def test_openvino_draws_what_torch_draws(place, picture, tmp_path):
    folder, _ = place
    openvino_like_torch(folder, tmp_path, PROMPT, image=picture, **OURS)


def test_any_size(place, tmp_path):
    """A picture of odd sides becomes one four times as large; width and height are those of the result."""
    folder, _ = place
    ours, odd = load(folder), Image.fromarray(np.random.default_rng(1).integers(0, 256, (7, 9, 3), np.uint8))
    out = ours(PROMPT, image=odd, num_inference_steps=1, seed=1)
    assert out.images[0].size == (36, 28)
    assert (out.metadata[0].width, out.metadata[0].height) == (36, 28)
    assert ours(PROMPT, image=odd, num_inference_steps=1, width=64, height=32).images[0].size == (64, 32)


def test_saved_as_it_was(place, picture, tmp_path):
    folder, _ = place
    load(folder).save_pretrained(tmp_path / "saved")
    again = StableDiffusionUpscalePipeline.from_pretrained(tmp_path / "saved")
    assert again.config.max_noise_level == 350
    assert again.low_res_scheduler.config.beta_end == 0.02
    options = {"num_inference_steps": 2, "image": picture, "seed": 2, "output_type": "uint8"}
    assert (load(tmp_path / "saved")(PROMPT, **options).images == load(folder)(PROMPT, **options).images).all()


def test_refusals(place, picture, tmp_path):
    folder, _ = place
    ours = load(folder)
    with pytest.raises(ConfigError, match="this model enlarges a picture: give one"):
        ours(PROMPT, num_inference_steps=2)
    for settings, message in (
        ({"noise_level": 351}, "noise_level must be below 351"),
        ({"strength": 0.5}, "strength does not apply"),
        ({"hires_scale": 2.0}, "hires_scale does not apply"),
        ({"width": 30}, "width must be a multiple of 4"),
        ({"mask_image": Image.new("L", picture.size, 255)}, "supports no mask"),
    ):
        with pytest.raises(ConfigError, match=message):
            ours(PROMPT, image=picture, num_inference_steps=2, **settings)
    stable_diffusion.pipeline("1").save_pretrained(tmp_path / "plain")
    with pytest.raises(ConfigError, match="noise_level requires a model that enlarges"):
        load(tmp_path / "plain")(PROMPT, noise_level=20)
    copy = shutil.copytree(folder, tmp_path / "odd")
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"max_noise_level": 5000}))
    with pytest.raises(ModelError, match="max_noise_level must be from 0 to 999"):
        load(copy)
    (copy / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(ModelError, match="only an upscaler has a U-Net that reads class labels"):
        load(copy)
    (copy / "model_index.json").write_text(json.dumps(index))
    (copy / "low_res_scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(ModelError, match=r"scheduler_config\.json is missing"):
        load(copy)


def test_not_taught(place, tmp_path, call):
    as_jsonl(tmp_path / "pictures", some_pictures(3))
    code, _, err = call("finetune", place[0], tmp_path / "pictures", "-o", tmp_path / "run", "--dry-run")
    assert code == 2
    assert "fine-tuning a model that enlarges pictures is not supported" in err


def test_from_the_shell(place, picture, tmp_path, call):
    picture.save(tmp_path / "small.png")
    words = ["generate", PROMPT, "-m", place[0], "-i", "small.png", "--steps", "2", "-s", "1", "-o", "large.png"]
    assert call(*words, "--set", "noise_level=40")[0] == 0
    record = read_metadata(tmp_path / "large.png")["latentdiff"]
    assert (record["width"], record["height"], record["request"]["noise_level"]) == (80, 48, 40)
    code, out, _ = call("reproduce", tmp_path / "large.png", "--model", place[0])
    assert code == 0
    assert "equal" in out


def test_cascade(place, tmp_path, call):
    """A base draws, the upscaler enlarges with the same prompt and seed: as one by hand after the other."""
    stable_diffusion.pipeline("1").save_pretrained(tmp_path / "base")
    base, enlarger, folder = load(tmp_path / "base"), load(place[0]), tmp_path / "quick"
    enlarger._recommend(num_inference_steps=3)
    enlarger.save_pretrained(folder)
    small = base(PROMPT, seed=3, num_inference_steps=2, width=16, height=16).images[0]
    expected = enlarger(PROMPT, image=small, seed=3, output_type="uint8").images
    base.load_cascade(folder)
    out = base(PROMPT, seed=3, num_inference_steps=2, width=16, height=16, output_type="uint8")
    assert out.images.shape == (1, 64, 64, 3)
    assert (out.images == expected).all()
    assert (out.metadata[0].width, out.metadata[0].height) == (64, 64)
    words = ["generate", PROMPT, "-m", tmp_path / "base", "--cascade", folder, "--steps", "2", "-s", "3", "-N", "3"]
    code, _, err = call(*words, "--size", "16x16", "-o", tmp_path / "out")
    assert code == 0, err
    pictures = sorted((tmp_path / "out").glob("*.png"))
    assert np.abs(np.asarray(Image.open(pictures[0])).astype(int) - expected[0]).max() <= 1
    more = ["--model", tmp_path / "base", "--source", folder]
    assert call("reproduce", pictures[1], *more)[0] == 0
    assert call(*words, "--size", "16x16", "--steps-gif", "-o", tmp_path / "gif")[0] == 2
    with pytest.raises(ConfigError, match="callback_on_step_end is not supported in a cascade"):
        base(PROMPT, num_inference_steps=1, callback_on_step_end=lambda *_: {})
    with pytest.raises(ConfigError, match="prompt_embeds do not apply in a cascade"):
        base(prompt_embeds=torch.zeros(1, 77, 64), num_inference_steps=1, guidance_scale=1.0)
    base.load_cascade(folder)
    with pytest.raises(ConfigError, match="the enlarged picture has 16384x16384 pixels"):
        base(PROMPT, width=1024, height=1024, num_inference_steps=1)
    with pytest.raises(ConfigError, match="a cascade requires models that enlarge pictures"):
        base.load_cascade(tmp_path / "base")
