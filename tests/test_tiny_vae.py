"""Tiny VAEs: drawn with as diffusers draws, by either runtime, put in place of another, and learnt from one."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline

from latentdiff import LatentDiffusionPipeline
from latentdiff.core.errors import ConfigError, ModelError, UnsafeError
from latentdiff.diffusion.noise import normal
from latentdiff.drawing.pixels import encode_images
from latentdiff.drawing.reproduce import reproduce
from latentdiff.families import check_vae
from latentdiff.families.loading import included_model
from latentdiff.families.weights import load_vae
from latentdiff.networks.codecs.kl import KLAutoencoder
from latentdiff.networks.codecs.tiny import TinyAutoencoder
from latentdiff.settings.config import load_config
from latentdiff.training.autoencoder import TinyAutoencoderStage

from .conftest import ROOT
from .forked import SMALL


def again(path, *words):
    """The picture in the file, drawn again."""
    return reproduce(path, LatentDiffusionPipeline.from_pretrained, *words)


PROMPT = "a red circle above a blue square"
OPTIONS = {"num_inference_steps": 2, "guidance_scale": 3.0, "width": 64, "height": 64}


def tiny_vae(folder, levels=4, scaling=1.0):
    """A tiny VAE with random weights, written by diffusers. One of two levels has the shape of the tiny model's."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderTiny(
            encoder_block_out_channels=(8,) * levels,
            decoder_block_out_channels=(8,) * levels,
            num_encoder_blocks=(1,) * levels,
            num_decoder_blocks=(1,) * levels,
            scaling_factor=scaling,
        )
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return tiny_vae(tmp_path_factory.mktemp("vae") / "small", levels=2)


@pytest.fixture(scope="module")
def model(folders, tmp_path_factory):
    """A tiny Stable Diffusion 1 with a tiny VAE, as diffusers writes it."""
    folder = tmp_path_factory.mktemp("model") / "sd"
    theirs = StableDiffusionPipeline.from_pretrained(folders["1"])
    theirs.vae = AutoencoderTiny.from_pretrained(tiny_vae(folder.parent / "vae", scaling=0.8))
    theirs.save_pretrained(folder)
    return folder


def test_as_diffusers_draws(model):
    """The config of older ones lacks the widths of levels under the VAE's own name."""
    config = json.loads((model / "vae" / "config.json").read_text())
    del config["block_out_channels"]
    (model / "vae" / "config.json").write_text(json.dumps(config))
    theirs, ours = StableDiffusionPipeline.from_pretrained(model), LatentDiffusionPipeline.from_pretrained(model)
    theirs.set_progress_bar_config(disable=True)
    assert ours.model.multiple == 8
    noise = torch.from_numpy(normal((2, 4, 8, 8), 0, "test"))
    options = OPTIONS | {"num_inference_steps": 4}
    expected = theirs([PROMPT] * 2, latents=noise, output_type="np", **options).images
    settings = {"sampler": "ddim", "spacing": "trailing", "num_images_per_prompt": 2, "output_type": "np"}
    picture = ours(PROMPT, latents=noise, **settings, **options).images
    assert np.abs(picture - expected).max() < 1e-5
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    torch.testing.assert_close(
        encode_images(ours.model, images), theirs.vae.encode(images).latents * 0.8, rtol=0, atol=1e-6
    )


def test_saved_and_loaded(model, tmp_path):
    """Here and in diffusers; no single file holds one."""
    ours = LatentDiffusionPipeline.from_pretrained(model)
    ours.save_pretrained(tmp_path / "saved")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert isinstance(again.vae, AutoencoderTiny)
    for name, weight in ours.model.codec.vae.state_dict().items():
        assert torch.equal(again.vae.state_dict()[name], weight)
    from latentdiff.families.original import save_single_file

    with pytest.raises(ConfigError, match="requires the shape of a Stable Diffusion model"):
        save_single_file(ours.model, tmp_path / "one.safetensors")


@pytest.mark.slow
def test_by_openvino(call, tiny_model, vae, tmp_path):
    """A model with a tiny VAE in it: exported, and drawn with as torch does."""
    code, _, err = call("convert", tiny_model, tmp_path / "made", "--vae", vae, "--to", "openvino")
    assert code == 0, err
    assert "vae_decoder: differs from torch by" in err
    options = {"seed": 3, "output_type": "uint8"} | OPTIONS
    ours, theirs, plain = (
        LatentDiffusionPipeline.from_pretrained(folder, runtime=runtime, torch_dtype="float32")(
            PROMPT, **options
        ).images
        for folder, runtime in ((tmp_path / "made", "openvino"), (tmp_path / "made", "torch"), (tiny_model, "torch"))
    )
    assert np.abs(ours.astype(int) - theirs).max() <= 1
    assert np.abs(ours.astype(int) - plain).mean() > 10, "the VAE is another"


def test_tiles(model, vae, tmp_path):
    """Where one tile holds it all, a picture in tiles is the picture; diffusers takes another factor than 4 for 8."""
    for place in (vae, model / "vae"):
        network = load_vae(check_vae(place))
        latents = torch.from_numpy(normal((1, 4, 12, 8), 0, "test"))
        whole = network.images_of(latents)
        with network.piecewise(tiles=True, slices=False):
            torch.testing.assert_close(network.images_of(latents), whole, rtol=0, atol=1e-6)
        images = torch.from_numpy(normal((1, 3, 12 * network.factor, 8 * network.factor), 0, "images"))
        with network.piecewise(tiles=True, slices=False):
            tiled = network.latents_of(images)
        torch.testing.assert_close(tiled, network.latents_of(images), rtol=0, atol=1e-6)
    grey = TinyAutoencoder.create((8, 8), 1, 4, image_channels=1)
    with (
        pytest.raises(ConfigError, match="vae_tiling requires a tiny VAE of 3 image channels"),
        grey.piecewise(tiles=True, slices=False),
    ):
        pass


def test_put_in_a_model(call, tiny_model, vae, tmp_path):
    """A picture drawn with a tiny VAE names it in its record, and is drawn again to the bit."""
    shutil.copytree(tiny_model, tmp_path / "model")
    shutil.copytree(vae, tmp_path / "vae")
    words = ["-s", 3, "--steps", 2, "--runtime", "torch"]
    assert call("generate", PROMPT, "-m", "model", "--vae", "vae", "-o", "a.png", *words)[0] == 0
    assert call("convert", "model", "made", "--vae", "vae")[0] == 0
    assert json.loads((tmp_path / "made" / "model_index.json").read_text())["vae"] == ["diffusers", "AutoencoderTiny"]
    assert call("generate", PROMPT, "-m", "made", "-o", "b.png", *words)[0] == 0
    from PIL import Image

    a, b = (np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png"))
    assert np.array_equal(a, b)
    assert again(tmp_path / "a.png")[1].equal
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(
        (tiny_vae(tmp_path / "other", 2, 0.9) / "diffusion_pytorch_model.safetensors").read_bytes()
    )
    assert again(tmp_path / "a.png")[1].equal, "the same weights"
    tiny = TinyAutoencoder.create((8, 8), 1, 4)
    tiny.save(tmp_path / "vae")
    with pytest.raises(ModelError, match="vae is another file now"):
        again(tmp_path / "a.png")


def test_a_models_own_is_found_in_it(model, tiny_model):
    """Of a model folder its VAE, a larger one too."""
    assert check_vae(model) == (model / "vae").resolve()
    pipe = LatentDiffusionPipeline.from_pretrained(tiny_model, runtime="torch", device="cpu")
    before = pipe(PROMPT, seed=1, output_type="uint8", **OPTIONS).images
    pipe.load_vae(tiny_model)
    assert np.array_equal(pipe(PROMPT, seed=1, output_type="uint8", **OPTIONS).images, before)


def damaged(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def pickled(folder):
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "weights")
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")


BAD = {
    "levels": (lambda f: tiny_vae(f, 4), ModelError, "does not fit the model: its factor is 8, not 2"),
    "nothing": (shutil.rmtree, ModelError, "no VAE"),
    "class": (lambda f: damaged(f, lambda c: c.update(_class_name="Evil")), UnsafeError, "unknown class Evil"),
    "code": (lambda f: (f / "x.py").write_text("1"), UnsafeError, "asks to run code"),
    "pickle": (pickled, UnsafeError, "is a pickle"),
    "scale": (lambda f: damaged(f, lambda c: c.update(scaling_factor=0)), ModelError, "scaling_factor"),
    "size": (lambda f: damaged(f, lambda c: c.update(latent_channels=10**7)), ModelError, "absurd"),
}


@pytest.mark.parametrize(("change", "kind", "message"), BAD.values(), ids=BAD.keys())
def test_what_is_refused(tiny_model, vae, tmp_path, change, kind, message):
    folder = shutil.copytree(vae, tmp_path / "vae")
    change(folder)
    pipe = LatentDiffusionPipeline.from_pretrained(tiny_model, runtime="torch", device="cpu")
    before = pipe.model.codec
    with pytest.raises(kind, match=message):
        pipe.load_vae(folder)
    assert pipe.model.codec is before
    assert "vae" not in pipe.painter.sources


def test_not_in_what_was_exported(compiled_model, vae):
    """torch takes over, and says so; where OpenVINO was asked for by name it is refused."""
    with pytest.warns(UserWarning, match="another VAE requires torch"):
        LatentDiffusionPipeline.from_pretrained(compiled_model, device="cpu").load_vae(vae)
    with pytest.raises(ConfigError, match="another VAE requires the torch runtime"):
        LatentDiffusionPipeline.from_pretrained(compiled_model, runtime="openvino").load_vae(vae)


def test_the_loss():
    """By hand: the teacher's posterior decoded, in value and in edges, and the distance of the latents."""
    teacher, tiny = KLAutoencoder.create((8, 8), 1, 4, 4), TinyAutoencoder.create((8, 8), 1, 4)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 24, 20, 3), np.uint8)
    stage = TinyAutoencoderStage(
        tiny,
        lambda row: (pixels[row], str(row)),
        teacher,
        seed=0,
        crop=16,
        latent_shape=(4, 8, 8),
        gradient_weight=0.5,
        latent_weight=0.25,
    )
    batch = stage.batch(range(2))
    with torch.no_grad():
        result = stage.loss(tiny, batch)
        images, eps = batch["images"], batch["noise"]
        posterior = teacher.vae.encode(images).latent_dist
        decoded = tiny.vae.decode(posterior.mean + posterior.std * eps).sample
        own = tiny.vae.encode(images).latents
    off = (decoded - images).numpy()
    value = np.abs(off).mean((1, 2, 3))
    edges = np.abs(np.diff(off, axis=3)).mean((1, 2, 3)) + np.abs(np.diff(off, axis=2)).mean((1, 2, 3))
    latents = (own - posterior.mean).abs().mean((1, 2, 3)).numpy()
    np.testing.assert_allclose(result.numpy(), value + 0.5 * edges + 0.25 * latents, rtol=1e-5)
    assert not any(weight.requires_grad for weight in teacher.parameters())
    torch.testing.assert_close(stage.reconstruct(images), tiny.vae.decode(posterior.mean).sample)


@pytest.fixture
def train(call, tiny_model):
    """Train a tiny VAE by the tiny model's, for a few steps."""
    return partial(_train, call, tiny_model)


def _train(call, teacher, *words):
    settings = {
        **dict(change.split("=") for change in SMALL),
        "autoencoder.kind": '"tiny"',
        "autoencoder.teacher": teacher,
        "autoencoder.block_out_channels": "[8, 8]",
        "autoencoder.training.max_train_steps": 90,
        "autoencoder.training.validation_steps": 30,
    }
    pairs = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    return call("train", ROOT / "configs/scenes-tiny.toml", "--stage", "autoencoder", "-o", "run", *pairs, *words)


@pytest.mark.slow
def test_learnt_from_a_models_own(train, tiny_model, tmp_path):
    """It decodes the model's latents the better the longer it learns, and diffusers reads it."""
    code, _, err = train()
    assert code == 0, err
    lines = [json.loads(line) for line in (tmp_path / "run/autoencoder/log.jsonl").read_text().splitlines()]
    psnrs = [line["psnr"] for line in lines if "psnr" in line]
    assert len(psnrs) == 3
    assert psnrs[2] > psnrs[0] + 2, "dB"
    theirs, ours = AutoencoderTiny.from_pretrained(tmp_path / "run/model/vae"), load_vae(tmp_path / "run/model/vae")
    x = torch.from_numpy(normal((1, 4, 8, 8), 0, "test"))
    assert torch.equal(theirs.decode(x).sample, ours.decode(x))
    # of another teacher it is another run
    other = shutil.copytree(tiny_model / "vae", tmp_path / "other")
    from safetensors.torch import load_file, save_file

    file = other / "diffusion_pytorch_model.safetensors"
    save_file({name: weight * 1.01 for name, weight in load_file(file).items()}, file)
    code, _, err = train("--set", "autoencoder.training.max_train_steps=61", "--set", "autoencoder.teacher=other")
    assert code == 2
    assert "cannot resume: autoencoder.teacher" in err
    code, _, err = train(
        *("--set", "autoencoder.training.max_train_steps=61", "--set", "autoencoder.teacher=other", "--allow-changed")
    )
    assert code == 4
    assert "belongs to other networks" in err


WRONG = {
    "widths": (("autoencoder.block_out_channels=[8,8,16]",), 2, "a tiny autoencoder requires equal block_out_channels"),
    "levels": (
        ("autoencoder.block_out_channels=[8,8,8]",),
        2,
        "autoencoder.teacher must have the same shape: its factor is 4, not 2",
    ),
    "channels": (("autoencoder.latent_channels=8",), 2, "its latent_channels is 8, not 4"),
    "teacher": (("autoencoder.teacher=nowhere",), 4, "no VAE (nowhere)"),
    "pupil": (('autoencoder.kind="kl"', "autoencoder.teacher=x"), 2, 'teacher requires kind = "tiny"'),
}


@pytest.mark.parametrize(("settings", "code", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_cannot_be_learnt(train, settings, code, message):
    result, _, err = train(*(word for setting in settings for word in ("--set", setting)))
    assert (result, message in err) == (code, True), err
    assert err.count("error:") == 1


def test_the_config():
    """The one that ships: of scenes-64's latents."""
    config = load_config(ROOT / "configs" / "tiny-vae.toml").autoencoder
    made = TinyAutoencoder.create(config.block_out_channels, config.layers_per_block, config.latent_channels)
    teacher = load_vae(check_vae(included_model("scenes-64")))
    assert (made.factor, made.latent_channels) == (teacher.factor, teacher.latent_channels)
