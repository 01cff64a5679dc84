"""Weights of fewer bits: what a layer computes, what a picture loses, what files keep, what is refused."""

import json
import shutil
import struct

import gguf
import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.quantizers.gguf.utils import GGUFParameter
from safetensors.torch import save_file
from torch import nn

from latentdiff.core.errors import ConfigError, ModelError
from latentdiff.drawing.pixels import are_flat
from latentdiff.formats.gguf_file import read_gguf, shapes_in
from latentdiff.networks.blocks import BlockLinear, dequantized, in_blocks, repeated_layers
from latentdiff.networks.saving import save_gguf
from latentdiff.pipeline import LatentDiffusionPipeline

from . import flux
from .test_flow_adapters import factors

OPTIONS = {"seed": 1, "num_inference_steps": 2, "width": 64, "height": 64, "output_type": "pt"}
PROMPT = "a castle on the hill"
TYPES = {"q8_0": (8.5, 127), "q4_0": (4.5, 7)}  # bits a weight; steps from zero to the largest of a block


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("flux") / "dev"
    flux.pipeline().save_pretrained(place)
    return place


def draw(pipe):
    return pipe(PROMPT, **OPTIONS).images[0]


def opened(folder, **settings):
    return LatentDiffusionPipeline.from_pretrained(folder, device="cpu", **settings)


@pytest.fixture(scope="module")
def picture(folder):
    return draw(opened(folder))


@pytest.mark.parametrize("kind", TYPES)
def test_blocks_are_those_of_the_library(kind):
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(0))
    bits, steps = TYPES[kind]
    made = in_blocks(weight, kind)
    assert made.numel() * 8 == bits * weight.numel()
    type_ = gguf.GGMLQuantizationType[kind.upper()]
    theirs = gguf.quants.dequantize(made.as_tensor().numpy(), type_)
    assert (
        np.abs(dequantized(made).numpy() - theirs).max() <= 2**-11 * np.abs(theirs).max()
    )  # the scale's product in half
    blocks = weight.reshape(48, 3, 32)
    step = blocks.abs().amax(-1, keepdim=True) / steps
    assert ((dequantized(made).reshape(blocks.shape) - blocks).abs() <= 1.01 * step).all()


def test_a_layer_computes_with_the_numbers_of_its_blocks():
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 40), torch.randn(2, 3, 64)
    weight = in_blocks(layer.weight, "q4_0")
    block = BlockLinear(layer, weight)
    assert torch.equal(block.weight, dequantized(weight))
    assert torch.equal(block(x), nn.functional.linear(x, dequantized(weight), layer.bias))
    narrow = nn.functional.linear(x.bfloat16(), dequantized(weight).bfloat16(), layer.bias.bfloat16())
    assert torch.equal(block.bfloat16()(x.bfloat16()), narrow)
    assert block.weight.dtype == torch.bfloat16
    assert torch.equal(block.blocks, weight.as_tensor())


def test_only_layers_in_numbered_blocks_are_quantized(folder):
    network = FluxTransformer2DModel.from_pretrained(folder / "transformer")
    names = {name for name, _ in repeated_layers(network)}
    assert names
    assert all("blocks." in name for name in names)
    assert not names & {"x_embedder", "context_embedder", "proj_out"}
    assert [name for name, _ in repeated_layers(nn.Sequential(nn.Linear(64, 64)))] == []  # a number of its own


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.01), ("q8_0", 0.01), ("fp8", 0.05), ("q4_0", 0.2)])
def test_pictures_stay_near(folder, picture, kind, bound):
    """And finer weights come nearer."""
    pipe = opened(folder, quantize=kind)
    distance = float((draw(pipe) - picture).norm() / picture.norm())
    assert 0 < distance < bound
    assert pipe.model.quantized == kind
    assert pipe.is_quantized


@pytest.mark.parametrize("kind", TYPES)
def test_saved_blocks_are_loaded_to_the_bit(folder, kind, tmp_path):
    pipe = opened(folder, quantize=kind)
    pipe.save_pretrained(tmp_path / "saved")
    again = opened(tmp_path / "saved")
    assert again.is_quantized
    assert torch.equal(draw(again), draw(pipe))
    for name, tensor in pipe.components["transformer"].state_dict().items():
        other = again.components["transformer"].state_dict()[name]
        assert torch.equal(torch.as_tensor(tensor.data), torch.as_tensor(other.data)), name
    pipe.save_pretrained(tmp_path / "twice")
    both = [(tmp_path / place / "transformer" / "model.gguf").read_bytes() for place in ("saved", "twice")]
    assert both[0] == both[1]


@pytest.mark.parametrize("kind", TYPES)
def test_a_folder_by_the_command_line(folder, kind, tmp_path, call):
    """It is as small as its blocks, and draws what the option draws of the whole model."""
    out = tmp_path / kind
    assert call("convert", folder, out, "--quantize", kind)[0] == 0
    assert torch.equal(draw(opened(out)), draw(opened(folder, quantize=kind)))
    assert not list((out / "transformer").glob("*.safetensors"))
    code, of_file, _ = call("info", out / "transformer" / "model.gguf")
    assert (code, json.loads(of_file)["precision"]) == (0, ["F32", kind.upper()])
    _, of_folder, _ = call("info", out)
    counts = json.loads(of_folder)["parameters"]
    assert counts["transformer"] == sum(p.numel() for p in opened(folder).components["transformer"].parameters())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--quantize", "int8"], "a folder keeps q8_0 or q4_0; int8 is an option of generate and serve"),
        (["--quantize", "q4_0", "--to", "openvino"], "--to openvino has no quantized form"),
    ],
)
def test_what_no_folder_keeps_is_refused(folder, words, message, tmp_path, call):
    code, _, err = call("convert", folder, tmp_path / "out", *words)
    assert (code, message in err) == (2, True)
    assert not (tmp_path / "out").exists()


def test_another_kind_and_the_same_twice(folder, tmp_path):
    with pytest.raises(ConfigError, match="unknown kind of weights 'int2'; one of int8, fp8, q8_0, q4_0, int4"):
        opened(folder, quantize="int2")
    with pytest.raises(ConfigError, match="unknown kind of weights in torch 'int4'"):
        opened(folder, quantize="int4", runtime="torch")
    with pytest.raises(ConfigError, match="unknown kind of weights in openvino 'fp8'"):
        opened(folder, quantize="fp8", runtime="openvino")
    opened(folder, quantize="q8_0").save_pretrained(tmp_path / "saved")
    with pytest.raises(ConfigError, match="quantized already"):
        opened(tmp_path / "saved", quantize="q4_0")


@pytest.mark.parametrize("kind", ["int8", "q8_0"])
def test_adapters_stay_beside(folder, kind, tmp_path, call):
    """They draw what they draw beside whole weights, to the rounding of the weights; added they would be lost."""
    pipe = opened(folder, quantize=kind)
    state = {}
    for name, (down, up) in factors(opened(folder).components["transformer"]).items():
        state |= {f"transformer.{name}.lora_A.weight": down.clone(), f"transformer.{name}.lora_B.weight": up}
    save_file(state, tmp_path / "lora.safetensors")
    plain, whole = draw(pipe), opened(folder)
    for each in (pipe, whole):
        each.load_lora_weights(tmp_path / "lora.safetensors")
    beside = draw(pipe)
    added = beside - plain
    assert float((draw(pipe) - draw(whole)).norm()) < 0.05 * float(added.norm())
    with pytest.raises(ModelError, match="cannot be added to quantized weights"):
        pipe.fuse_lora(0.5)
    assert torch.equal(draw(pipe), beside)
    words = ("--lora", tmp_path / "lora.safetensors", "--quantize", kind, "--seed", "1", "-o", "x.png", "--steps", "2")
    assert call("generate", PROMPT, "-m", folder, "--size", "64x64", *words)[0] == 0
    code, out, _ = call("reproduce", "x.png", "--source", tmp_path, "-m", folder)
    assert (code, out.startswith("equal")) == (0, True), out


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.02), ("int4", 0.2)])
def test_graphs(kind, bound, tmp_path, monkeypatch):
    """By OpenVINO: near the whole weights, the same from the cache, and the VAE is whole."""
    settings = {"seed": 1, "num_inference_steps": 4, "output_type": "pt"}

    def draw_compiled(**options):
        pipe = LatentDiffusionPipeline.from_pretrained(
            device="cpu", runtime="openvino", torch_dtype="float32", **options
        )
        return pipe, pipe("a red circle", **settings).images[0]

    monkeypatch.setenv("LATENTDIFF_CACHE", str(tmp_path))
    _, whole = draw_compiled()
    before = {file.name for file in tmp_path.iterdir()}
    pipe, picture = draw_compiled(quantize=kind)
    assert 0 < float((picture - whole).norm() / whole.norm()) < bound
    made = {file.name for file in tmp_path.iterdir()} - before
    assert len(made) == 2  # text encoder and U-Net
    assert sum((tmp_path / name).stat().st_size for name in made) < sum((tmp_path / n).stat().st_size for n in before)
    assert torch.equal(draw_compiled(quantize=kind)[1], picture)
    assert {file.name for file in tmp_path.iterdir()} == before | made
    assert pipe.model.quantized == kind


def test_flat_pictures_are_said(folder, call, tmp_path):
    """One of two is; a picture with a single other value is not."""
    pipe = opened(folder, quantize="q4_0")
    decoder = pipe.components["vae"].decoder
    whole = decoder.forward

    def first_is_flat(z, *rest):
        images = whole(z, *rest)
        images[0] = 0.25
        return images

    decoder.forward = first_is_flat
    extra = OPTIONS | {"num_images_per_prompt": 2, "batch_size": 2}
    note = "one colour fills the whole picture (seeds 1). Perhaps q4_0 is too coarse for this model"
    assert pipe(PROMPT, **extra).notes == [note]
    images = np.full((2, 3, 4, 4), 0.5, np.float32)
    images[1, 2, 3, 3] = 0.52
    assert are_flat(images).tolist() == [True, False]
    assert are_flat(torch.from_numpy(images)).tolist() == [True, False]


def test_a_damaged_file_is_one_line(folder, tmp_path, call):
    out = tmp_path / "cut"
    opened(folder, quantize="q4_0").save_pretrained(out)
    file = out / "transformer" / "model.gguf"
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"GGUF" + bytes(100), whole[:200], b"", b"GGUF"):
        file.write_bytes(content)
        code, _, err = call("generate", PROMPT, "-m", out, "--size", "64x64")
        assert (code, err.count("\n"), err.startswith("error: ")) == (4, 1, True), err


def test_what_a_file_keeps(tmp_path):
    """Every type of number, with its bits; and blocks."""
    state = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).half(),
        "c": torch.randn(2, 3, 3, 3).bfloat16(),
        "d": torch.arange(5),
        "e": in_blocks(torch.randn(4, 64), "q4_0"),
    }
    save_gguf(state, tmp_path / "x.gguf", "some")
    again = read_gguf(tmp_path / "x.gguf")
    for name, tensor in state.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name].as_subclass(torch.Tensor), tensor.as_subclass(torch.Tensor)), name
    assert isinstance(again["e"], GGUFParameter)
    assert shapes_in(tmp_path / "x.gguf") == {"a": (3, 5), "b": (7,), "c": (2, 3, 3, 3), "d": (5,), "e": (4, 64)}


def test_a_unet(folders, tmp_path):
    """Of its weights the convolutions stay, and so do the text encoder's tables."""
    pipe = opened(folders["1"], quantize="q8_0")
    kinds = {type(module) for _, module in repeated_layers(pipe.components["unet"])}
    assert kinds == {BlockLinear}
    plain = opened(folders["1"])
    for part in ("unet", "text_encoder"):
        own, theirs = pipe.components[part].state_dict(), plain.components[part].state_dict()
        kept = [name for name in own if name.endswith(("conv1.weight", "conv_in.weight", "embedding.weight"))]
        assert kept
        assert all(torch.equal(own[name], theirs[name]) for name in kept)
    pipe.save_pretrained(tmp_path / "saved")
    assert torch.equal(draw(opened(tmp_path / "saved")), draw(pipe))


@pytest.fixture(scope="module")
def blocks(folders, tmp_path_factory):
    """A Stable Diffusion 1 whose weights lie in blocks."""
    place = tmp_path_factory.mktemp("blocks") / "q8"
    opened(folders["1"], quantize="q8_0").save_pretrained(place)
    return place


@pytest.mark.parametrize("kind", ["int8", "fp8", "q4_0", None])
def test_what_is_fused_for_speed_is_not_saved(folders, blocks, kind, tmp_path, monkeypatch):
    """Quantized projections are not fused at all; others are taken apart before they are saved."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    folder = blocks if kind == "q4_0" else folders["1"]
    pipe = opened(folder, quantize=None if kind == "q4_0" else kind, speed="fast", runtime="torch")
    plain = opened(folder, quantize=None if kind == "q4_0" else kind, runtime="torch")
    torch.testing.assert_close(draw(pipe), draw(plain), rtol=1e-4, atol=1e-4)
    if kind in ("int8", "fp8"):
        with pytest.raises(ConfigError, match=f"{kind} cannot be saved; q8_0 and q4_0 can"):
            pipe.save_pretrained(tmp_path / "saved")
        return
    pipe.save_pretrained(tmp_path / "saved")
    assert torch.equal(draw(opened(tmp_path / "saved")), draw(plain))


def test_a_property_s_own_fault_is_shown(folders, monkeypatch):
    """Not that there is no such property."""
    pipe = opened(folders["1"], speed="fast", runtime="torch")
    monkeypatch.setattr("latentdiff.runtime.speed.sped_up", lambda *_: pipe.nothing)
    with pytest.raises(AttributeError, match="has no nothing"):
        draw(pipe)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("convert", "BLOCKS", "--to", "openvino"), 2, "a model with quantized weights cannot"),
        (("convert", "BLOCKS", "x.safetensors"), 2, "quantized weights require a folder, not a single file"),
        (("convert", "BLOCKS", "x", "--quantize", "q4_0"), 2, "files are quantized already"),
        (("convert", "BLOCKS", "x", "--quantize", "q2"), 2, "unknown kind of weights 'q2'; one of int8"),
        (("generate", "a", "-m", "BLOCKS", "--runtime", "openvino"), 4, "openvino cannot read the quantized weights"),
        (("generate", "a", "-m", "BLOCKS", "--quantize", "int4"), 2, "int4 requires OpenVINO on a CPU and graphs"),
        (("generate", "a", "--quantize", "int4", "--vae", "BLOCKS"), 2, "torch runtime, which has no int4"),
        (("generate", "a", "--quantize", "int3"), 2, "unknown kind of weights 'int3'; one of int8, fp8, q8_0, q4_0"),
    ],
)
def test_what_quantized_weights_cannot_do(blocks, words, code, message, call):
    result, _, err = call(*(blocks if word == "BLOCKS" else word for word in words))
    assert (result, err.count("\n"), message in err) == (code, 1, True), err


def test_numbers_beside_blocks_are_converted(blocks, call, tmp_path):
    """Another precision of a folder: the blocks stay, to the bit, and all numbers change."""
    assert call("convert", blocks, "half", "--dtype", "float16")[0] == 0
    before, after = (read_gguf(place / "unet" / "model.gguf") for place in (blocks, tmp_path / "half"))
    for name, tensor in before.items():
        if isinstance(tensor, GGUFParameter):
            assert torch.equal(after[name].as_tensor(), tensor.as_tensor())
        else:
            assert torch.equal(after[name], tensor.half()), name
    assert json.loads(call("info", "half")[1])["quantized"]["unet"] == ["F16", "Q8_0"]


def test_two_sets_of_weights_are_refused(blocks, folders, tmp_path, call):
    both = shutil.copytree(blocks, tmp_path / "both")
    (weights,) = (folders["1"] / "unet").glob("*.safetensors")
    shutil.copy(weights, both / "unet")
    code, _, err = call("generate", "a", "-m", both)
    assert (code, "unet has both model.gguf and safetensors weights" in err) == (4, True)


def test_the_precision_of_fp8_is_chosen_at_loading(folders):
    pipe = opened(folders["1"], quantize="fp8")
    with pytest.raises(ConfigError, match="choose dtype when loading"):
        pipe.to(dtype=torch.float16)
    assert draw(pipe.to(torch.float32)).shape == (3, 64, 64)  # a dtype comes first in diffusers' code too
    assert opened(folders["1"]).to(torch.float16).model.dtype == "float16"


def _header(*parts, tensors=1, entries=1, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries) + b"".join(parts)


TEXT = struct.pack("<Q", 1) + b"a"


@pytest.mark.parametrize(
    "content",
    [
        _header(TEXT, struct.pack("<IIQ", 9, 0, 2**40), bytes(100)),
        _header(TEXT, struct.pack("<IIQ", 9, 0, 2**19), bytes(100)),
        _header(TEXT, struct.pack("<IIQ", 9, 9, 5), bytes(100)),
        _header(TEXT, struct.pack("<IQ", 8, 2**40), bytes(100)),
        _header(TEXT, struct.pack("<I", 77), bytes(100)),
        _header(struct.pack("<Q", 2**60), bytes(100)),
        _header(bytes(100), entries=2**50),
        _header(bytes(100), tensors=2**50, entries=0),
        _header(bytes(100), tensors=0, entries=0),
        _header(bytes(100), version=1),
        _header(bytes(10), tensors=3, entries=0),
    ],
)
def test_a_header_that_claims_too_much(content, call, tmp_path):
    """The library would read it for ever."""
    (tmp_path / "x.gguf").write_bytes(content)
    code, _, err = call("info", "x.gguf")
    assert (code, err.count("\n")) == (4, 1), err
