"""Upscalers that spandrel reads: what they make of finished pictures, and of those that a second pass draws over."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from spandrel import ModelLoader
from spandrel.architectures.ESRGAN.__arch.RRDB import RRDBNet

from latentdiff.core.errors import ModelError, NonFiniteError, UnsafeError


def size_of(path):
    with Image.open(path) as picture:
        return picture.size


PROMPT = {"prompt": "a red circle", "seed": 1, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def upscaler(tmp_path_factory):
    """A tiny ESRGAN with random weights, twice as large."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = RRDBNet(in_nc=3, out_nc=3, num_filters=8, num_blocks=1, scale=2)
    path = tmp_path_factory.mktemp("upscaler") / "tiny.safetensors"
    save_file(network.state_dict(), path)
    return path


def by_hand(path, pictures):
    described = ModelLoader("cpu").load_from_file(path).eval()
    with torch.no_grad():
        values = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
        return (described(values).clip(0, 1) * 255).round().permute(0, 2, 3, 1).numpy().astype(np.uint8)


def test_enlarges_finished_pictures(pipe, upscaler):
    image = pipe(**PROMPT, num_images_per_prompt=2, output_type="uint8")
    pipe.load_upscaler(upscaler)
    try:
        out = pipe(**PROMPT, num_images_per_prompt=2, output_type="uint8")
    finally:
        pipe._painter = pipe._painter.__class__(pipe.model)
    assert np.abs(out.images.astype(int) - by_hand(upscaler, image.images)).max() <= 1
    assert out.images.shape[1:3] == (128, 128)
    assert (out.metadata[0].width, out.metadata[0].height) == (128, 128)


def test_in_two_passes(pipe, upscaler):
    """The second pass draws over what it enlarged; the size is the asked one."""
    options = {**PROMPT, "hires_scale": 1.5, "output_type": "uint8"}
    plain = pipe(**options).images
    pipe.load_upscaler(upscaler)
    try:
        out = pipe(**options).images
    finally:
        pipe._painter = pipe._painter.__class__(pipe.model)
    assert out.shape == plain.shape == (1, 96, 96, 3)
    assert (out != plain).any()


def test_from_the_shell_and_again(tiny_model, upscaler, tmp_path, call):
    words = ["generate", "a red circle", "-m", tiny_model, "--steps", "2", "-s", "1", "--upscaler", upscaler]
    assert call(*words, "-o", "large.png")[0] == 0
    assert size_of(tmp_path / "large.png") == (128, 128)
    assert call("reproduce", "large.png", "--model", tiny_model, "--source", upscaler)[0] == 0
    assert call(*words, "--size", "2048x2048", "-o", "x.png", "--upscaler", tmp_path / "absent.safetensors")[0] == 4


def test_refusals(pipe, upscaler, tiny_model, tmp_path):
    with pytest.raises(ModelError, match="no such file"):
        pipe.load_upscaler(tmp_path / "absent.safetensors")
    with pytest.raises(ModelError, match="cannot load"):
        pipe.load_upscaler(tiny_model / "unet" / "diffusion_pytorch_model.safetensors")
    torch.save({}, tmp_path / "esrgan.pth")
    with pytest.raises(UnsafeError, match="pickle"):
        pipe.load_upscaler(tmp_path / "esrgan.pth")


def test_weights_of_not_a_number(pipe, upscaler, tmp_path):
    """No black picture in silence."""
    state = load_file(upscaler)
    next(iter(state.values())).fill_(float("nan"))
    save_file(state, tmp_path / "nan.safetensors")
    pipe.load_upscaler(tmp_path / "nan.safetensors")
    try:
        with pytest.raises(NonFiniteError, match="the upscaler gave non-finite"):
            pipe(**PROMPT)
    finally:
        pipe._painter = pipe._painter.__class__(pipe.model)
