"""Faster torch: what is promised of each speed, and that nothing stale is computed with when networks change."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from latentdiff import LatentDiffusionPipeline
from latentdiff.core.errors import ConfigError
from latentdiff.drawing.reproduce import read_record
from latentdiff.networks.conditions import Conditions
from latentdiff.runtime import speed as speeds

from . import flow_models

PROMPT = "a red circle above a blue square"
QUICK = {"num_inference_steps": 3, "seed": 1, "output_type": "uint8"}


@pytest.fixture
def uncompiled(monkeypatch):
    """What would be compiled, in the order in which it was asked for; compiling itself takes a minute."""
    options = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, mode=None: options.append(type(module).__name__))
    return options


@pytest.mark.parametrize("family", ["1", "2", "XL"])
@torch.no_grad()
def test_attention_in_one_product(folders, family):
    """The text's keys and values ahead and one product for the rest: the same output, and undone to the bit."""
    pipe = LatentDiffusionPipeline.from_pretrained(folders[family], device="cpu", runtime="torch")
    unet, generator = pipe.model.backbone, torch.Generator().manual_seed(0)
    shapes = {"tokens": (77, unet.spec.reads["tokens"][-1])} | ({"pooled": (128,)} if family == "XL" else {})
    arrays = {name: torch.randn(2, 3, *shape, generator=generator) for name, shape in shapes.items()}
    arrays |= {"sizes": torch.full((2, 3, 6), 64.0)} if family == "XL" else {}
    conditions = Conditions(arrays, count=2)
    x = torch.randn(3, 4, 8, 8, generator=generator)
    plain = unet.predict(x, 500.0, unet.prepared(conditions))
    narrow = unet.predict_perturbed(x, 500.0, unet.prepared(conditions))
    unet.fuse()
    prepared = unet.prepared(conditions)
    assert len(prepared.prepared) == sum(name.endswith("attn2") for name, _ in unet.named_modules())
    torch.testing.assert_close(unet.predict(x, 500.0, prepared), plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(unet.predict_perturbed(x, 500.0, prepared), narrow, rtol=1e-4, atol=1e-5)
    unet.unfuse()
    assert torch.equal(unet.predict(x, 500.0, unet.prepared(conditions)), plain)


@pytest.mark.parametrize(
    ("speed", "compiled", "dtype"),
    [
        ("exact", [], torch.float32),
        ("fast", ["UNet2DConditionModel"], torch.float32),
        ("max", ["UNet2DConditionModel", "Decoder"], torch.bfloat16),
    ],
)
def test_what_a_speed_does(tiny_model, uncompiled, speed, compiled, dtype):
    plain = LatentDiffusionPipeline.from_pretrained(tiny_model, runtime="torch", device="cpu", torch_dtype=dtype)
    pipe = LatentDiffusionPipeline.from_pretrained(tiny_model, runtime="torch", device="cpu", speed=speed)
    assert (pipe.model.backbone.dtype, uncompiled) == (dtype, []), "when the first picture is drawn"
    picture = [p(PROMPT, **QUICK).images.astype(int) for p in (pipe, plain)]
    assert uncompiled == compiled
    assert np.abs(picture[0] - picture[1]).max() <= (0 if speed == "exact" else 1 if speed == "fast" else 40)


def test_a_video_codec_keeps_its_layout(tmp_path, uncompiled):
    """Convolutions of three dimensions know no channels last; beside them those of two are laid out."""
    flow_models.qwen_image().save_pretrained(tmp_path / "model")
    pipe = LatentDiffusionPipeline.from_pretrained(tmp_path / "model", runtime="torch", device="cpu", speed="fast")
    pipe(PROMPT, **QUICK, width=64, height=64)
    flat, deep = (
        [part for part in pipe.model.codec.modules() if isinstance(part, kind)] for kind in (nn.Conv2d, nn.Conv3d)
    )
    assert all(layer.weight.is_contiguous(memory_format=torch.channels_last) for layer in flat)
    assert all(layer.weight.is_contiguous() for layer in deep)
    assert flat
    assert deep


@pytest.mark.slow
@pytest.mark.parametrize("speed", ["fast", "max"])
def test_compiled(speed, tmp_path):
    """As torch draws one by one; the record says how, and the picture is made again from it."""
    exact = LatentDiffusionPipeline.from_pretrained("scenes-64", runtime="torch", device="cpu")
    pipe = LatentDiffusionPipeline.from_pretrained("scenes-64", runtime="torch", device="cpu", speed=speed)
    ours, theirs = (
        p(PROMPT, seed=1, num_images_per_prompt=2, output_type="uint8").images.astype(int) for p in (pipe, exact)
    )
    assert np.abs(ours - theirs).mean() < (0.01 if speed == "fast" else 2)
    (path,) = pipe(PROMPT, num_inference_steps=3, seed=1).save(tmp_path)
    assert read_record(path).speed == speed


def test_adapters_after_the_first_picture(uncompiled, folders, tmp_path):
    """What is put into networks that were fused counts, and leaves no old text behind."""
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

    trained = LatentDiffusionPipeline.from_pretrained(folders["1"], device="cpu", runtime="torch")
    parts = {"unet": trained.model.backbone.model, "text_encoder": trained.model.encoder.model}
    for part in parts.values():
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_k", "to_q", "q_proj"]), part, "made")
        for module in part.modules():
            if hasattr(module, "lora_B"):
                torch.nn.init.normal_(module.lora_B["made"].weight, generator=torch.Generator().manual_seed(1))
    weights = {
        f"{name}.{key}": value.contiguous()
        for name, part in parts.items()
        for key, value in get_peft_model_state_dict(part, adapter_name="made").items()
    }
    save_file(weights, tmp_path / "made.safetensors")
    picture = []
    for speed, first in (("exact", False), ("fast", False), ("fast", True)):
        pipe = LatentDiffusionPipeline.from_pretrained(folders["1"], device="cpu", speed=speed)
        if first:
            before = pipe(PROMPT, **QUICK).images.astype(int)
        pipe.load_lora_weights(tmp_path / "made.safetensors")
        picture.append(pipe(PROMPT, **QUICK).images.astype(int))
    assert np.abs(picture[0] - picture[1]).max() <= 1
    assert (picture[1] == picture[2]).all()
    assert np.abs(before - picture[2]).max() > 5, "the adapter changes the picture"


@pytest.mark.parametrize("settings", [{"runtime": "openvino"}, {"runtime": "torch", "device": "cpu", "speed": "fast"}])
def test_text_is_encoded_once(compiled_model, monkeypatch, uncompiled, settings):
    """By compiled or sped-up networks, which users cannot train."""
    pipe, read = LatentDiffusionPipeline.from_pretrained(compiled_model, **settings), []
    kind = type(pipe.model.encoder)
    encode = kind.encode
    monkeypatch.setattr(kind, "encode", lambda self, prompt: read.append(prompt.text) or encode(self, prompt))
    for _ in range(2):
        pipe(PROMPT, **QUICK)
    assert read == [PROMPT, ""]
    pipe(PROMPT, **QUICK, clip_skip=1)
    assert read == [PROMPT, "", PROMPT], "read in another way"
    if pipe.runtime == "torch":
        pipe.to(dtype=torch.bfloat16)
        pipe(PROMPT, **QUICK)
        assert read[3:] == [PROMPT, ""], "by another network"


def test_networks_as_written_may_be_trained_between_two_pictures(compiled_model):
    pipe = LatentDiffusionPipeline.from_pretrained(compiled_model, runtime="torch", device="cpu")
    before = pipe(PROMPT, **QUICK).images.astype(int)
    for parameter in pipe.model.encoder.parameters():
        parameter.data *= 1.2
    assert np.abs(pipe(PROMPT, **QUICK).images - before).max() > 5


def test_unknown(compiled_model):
    with pytest.raises(ConfigError, match="unknown speed 'light'; one of exact, fast, max"):
        LatentDiffusionPipeline.from_pretrained(speed="light")
    assert speeds.narrow_dtype(torch.device("cpu")) == torch.bfloat16
    exact = LatentDiffusionPipeline.from_pretrained(compiled_model, runtime="openvino", speed="exact")
    assert exact.model.dtype == "float32"
