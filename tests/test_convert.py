"""Model folders in another precision."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentdiff import LatentDiffusionPipeline
from latentdiff.errors import ConfigError, ModelError
from latentdiff.models.convert import convert_folder

PROMPT = "a red circle above a blue square"


@pytest.fixture(scope="module")
def half_model(tiny_model, command, tmp_path_factory):
    out = tmp_path_factory.mktemp("half") / "in a new folder" / "model"
    assert command("convert", tiny_model, out, "--dtype", "float16").stdout.strip() == str(out)
    return out


def test_every_weight_is_rounded_once(tiny_model, half_model):
    files = sorted(file.relative_to(tiny_model) for file in tiny_model.rglob("*.safetensors"))
    assert {file.parts[0] for file in files} == {"clip", "text_encoder", "unet", "vae"}
    for file in files:
        full, half = load_file(tiny_model / file), load_file(half_model / file)
        assert full.keys() == half.keys()
        for name, tensor in full.items():
            assert torch.equal(half[name], tensor.half())
    assert sorted(p.name for p in tiny_model.rglob("*")) == sorted(p.name for p in half_model.rglob("*"))


def test_others_may_read_what_is_written(tiny_model, half_model, tmp_path):
    """A trained model and a converted one have the modes that the umask asks for, not safetensors' 0600."""
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    files = [file for folder in (tiny_model, half_model) for file in folder.rglob("*") if file.is_file()]
    assert {file.stat().st_mode for file in files} == {ordinary.stat().st_mode}


def test_drawn_with_in_float32_here_and_in_diffusers(half_model):
    """Half the bytes on disk change what is stored, not what is computed with."""
    from diffusers import StableDiffusionPipeline

    ours = LatentDiffusionPipeline.from_pretrained(half_model, device="cpu")
    theirs = StableDiffusionPipeline.from_pretrained(half_model)
    theirs.set_progress_bar_config(disable=True)
    latents = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    settings = {"num_inference_steps": 20, "guidance_scale": 3.0}
    expected = theirs([PROMPT] * 2, latents=latents.clone(), output_type="np", **settings).images
    drawn = ours(PROMPT, num_images_per_prompt=2, latents=latents, output_type="np", **settings).images
    assert np.abs(drawn / 255 - expected).max() <= 1.01 / 255 / 2 + 2e-3


def test_refused(tiny_model, half_model, tmp_path):
    with pytest.raises(ConfigError, match="exists; nothing is overwritten"):
        convert_folder(tiny_model, half_model, torch.float16)
    with pytest.raises(ModelError, match="no such model folder"):
        convert_folder(tmp_path / "none", tmp_path / "out", torch.float16)


def test_nothing_of_the_user_s_is_touched(tiny_model, tmp_path):
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "precious").write_text("x")
    convert_folder(tiny_model, tmp_path / "out", torch.float16)
    assert (tmp_path / "out.tmp" / "precious").exists()
    inside = tmp_path / "out" / "unet" / "inner"
    with pytest.raises(ConfigError, match="lies inside"):
        convert_folder(tmp_path / "out", inside, torch.float32)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.tmp"]


def test_a_weight_too_large_for_float16(tiny_model, tmp_path):
    """65,520 and more are infinite in float16; nothing is left behind."""
    convert_folder(tiny_model, tmp_path / "model", torch.float32)
    file = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["conv_in.bias"] += 65_520
    save_file(state, file)
    with pytest.raises(ConfigError, match=r"conv_in.bias of .* does not fit float16"):
        convert_folder(tmp_path / "model", tmp_path / "out", torch.float16)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    convert_folder(tmp_path / "model", tmp_path / "out", torch.bfloat16)
