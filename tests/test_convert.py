"""Models and adapters in other forms: precision, layout, names; and pickles, read in a process of their own."""

import argparse
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentdiff import LatentDiffusionPipeline
from latentdiff.core.errors import ConfigError, ModelError
from latentdiff.families.convert import convert_folder
from latentdiff.formats import unpickle

from . import stable_diffusion

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
    picture = ours(PROMPT, num_images_per_prompt=2, latents=latents, output_type="uint8", **settings).images
    assert np.abs(picture / 255 - expected).max() <= 1.01 / 255 / 2 + 2e-3


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


@pytest.fixture
def convert(call):
    """The command in this process: exit code, stdout and stderr."""
    return lambda *words: call("convert", *words)


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd1") / "model"
    stable_diffusion.pipeline("1").save_pretrained(folder)
    return folder


def test_folder_to_single_file_and_back(convert, sd1, tmp_path):
    """The same weights, to the bit; a precision on the way is a rounding once."""
    note = "note: a single file holds no size (64x64) and no recommended settings\n"
    assert convert(sd1, "one.safetensors") == (0, "one.safetensors\n", note)
    assert convert("one.safetensors", "back")[0] == 0
    for part in ("unet", "vae"):
        name = "diffusion_pytorch_model.safetensors"
        first, again = load_file(sd1 / part / name), load_file(tmp_path / "back" / part / name)
        assert all(torch.equal(first[key], again[key]) for key in first)
    assert convert("one.safetensors", "half.safetensors", "--dtype", "float16")[0] == 0
    whole, half = load_file("one.safetensors"), load_file("half.safetensors")
    assert all(torch.equal(half[name], tensor.half()) for name, tensor in whole.items())
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    assert {f.stat().st_mode for f in tmp_path.rglob("*.safetensors")} == {ordinary.stat().st_mode}


def test_adapters_both_ways(convert, sd1, tmp_path):
    module = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    generator = torch.Generator().manual_seed(0)
    state = {
        f"unet.{module}.lora_{x}.weight": torch.randn(s, generator=generator)
        for x, s in (("A", (4, 32)), ("B", (32, 4)))
    }
    save_file(state, tmp_path / "peft.safetensors")
    assert convert("peft.safetensors", "kohya.safetensors", "--to", "kohya", "-m", sd1)[0] == 0
    kohya = load_file(tmp_path / "kohya.safetensors")
    flat = f"lora_unet_{module.replace('.', '_')}"
    assert kohya.keys() == {f"{flat}.{name}" for name in ("lora_down.weight", "lora_up.weight", "alpha")}
    assert float(kohya[f"{flat}.alpha"]) == 4
    assert convert("kohya.safetensors", "again.safetensors", "--to", "peft", "-m", sd1)[0] == 0
    again = load_file(tmp_path / "again.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    save_file(state | {"unet.nowhere.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "more.safetensors")
    code, _, err = convert("more.safetensors", "lost.safetensors", "--to", "kohya", "-m", sd1)
    assert (code, "would be lost" in err) == (2, True)


class Canary:
    """Unpickling this creates a file."""

    def __reduce__(self):
        return open, ("canary", "w")


ITSELF = {"a": torch.ones(1)}
ITSELF["state_dict"] = ITSELF


def test_a_pickle_is_read_by_its_tensors_alone(convert, tmp_path):
    weights = {"a": torch.randn(3), "b": torch.ones(2, 2)}
    torch.save({"state_dict": weights | {"shared": weights["a"]}, "epoch": 3}, "model.ckpt")
    code, _, err = convert("model.ckpt", "model.safetensors")
    assert (code, "is a pickle file" in err, err.count("\n")) == (7, True, 1)
    assert convert("model.ckpt", "model.safetensors", "--trust-pickle") == (0, "model.safetensors\n", "")
    result = load_file("model.safetensors")
    assert all(torch.equal(result[name], tensor) for name, tensor in weights.items())
    torch.save({"string_to_param": {"*": torch.ones(2, 8)}, "name": "ink"}, "ink.pt")
    assert convert("ink.pt", "ink.safetensors", "--trust-pickle")[0] == 0
    assert load_file("ink.safetensors").keys() == {"emb_params"}


def test_a_module_of_the_current_folder_is_not_imported(convert, tmp_path):
    torch.save({"a": torch.ones(1)}, "model.ckpt")
    (tmp_path / "safetensors.py").write_text("open('canary', 'w')")
    assert convert("model.ckpt", "model.safetensors", "--trust-pickle")[0] == 0
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, "have the same name"),
        ({"epoch": 3}, "holds no tensors"),
        ({"__metadata__": torch.ones(1)}, "has a name that no safetensors file can hold"),
        ({(1, 2): torch.ones(1)}, "has a name that no safetensors file can hold"),
        (ITSELF, "a dictionary in it contains itself"),
    ],
)
def test_no_tensor_is_lost(tree, message):
    with pytest.raises(ValueError, match=message):
        unpickle.tensors_of(tree)


def test_tensors_have_the_names_of_their_places(convert):
    """In lists their numbers; a checkpoint without any is refused in one line."""
    assert unpickle.tensors_of([torch.ones(1), {"x": torch.zeros(2)}]).keys() == {"0", "1.x"}
    torch.save({"epoch": 3}, "model.ckpt")
    code, _, err = convert("model.ckpt", "model.safetensors", "--trust-pickle")
    assert (code, "holds no tensors" in err, err.count("\n")) == (4, True, 1)


def test_what_lies_beside_the_tensors(convert, monkeypatch):
    """Objects of training libraries are dropped by name and never built; of any other library the file is refused."""
    for name in ("pytorch_lightning.callbacks", "os_helper"):
        module = types.ModuleType(name)
        module.Checkpoint = type("Checkpoint", (), {"__module__": name, "__qualname__": "Checkpoint"})
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setitem(sys.modules, name.partition(".")[0], module)
        made = module.Checkpoint()
        made.best = {"score": torch.ones(1)}
        beside = {"callbacks": {"one": made}, "hyper": argparse.Namespace(rate=0.1), "seen": np.float64(3)}
        torch.save({"state_dict": {"a": torch.arange(3.0)}, **beside}, f"{name}.ckpt")
    code, _, err = convert("pytorch_lightning.callbacks.ckpt", "a.safetensors", "--trust-pickle")
    assert (code, err.count("\n")) == (0, 1), err
    assert err.startswith("note: objects beside the tensors are dropped: argparse.Namespace, numpy.")
    assert err.endswith(", pytorch_lightning.callbacks.Checkpoint\n")
    result = load_file("a.safetensors")
    assert (list(result), result["a"].tolist()) == (["a"], [0.0, 1.0, 2.0])
    code, _, err = convert("os_helper.ckpt", "b.safetensors", "--trust-pickle")
    assert (code, "os_helper.Checkpoint" in err) == (7, True)


@pytest.mark.parametrize(
    ("name", "is_dropped"),
    [
        ("argparse.Namespace", True),
        ("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint", True),
        ("numpy._core.multiarray.scalar", True),
        ("numpy.dtype", True),
        ("numpy.load", False),
        ("numpy.testing._private.utils.runstring", False),
        ("pathlib.os.system", False),
        ("typing.sys.modules", False),
        ("builtins.eval", False),
        ("os.system", False),
        ("argparse_.Namespace", False),
    ],
)
def test_only_classes_of_known_libraries_are_dropped(name, is_dropped):
    assert unpickle._is_dropped(name) == is_dropped


@pytest.mark.parametrize("archive", [False, True])
def test_a_pickle_that_would_run_code(convert, tmp_path, archive):
    if archive:
        torch.save({"state_dict": {"a": torch.zeros(1)}, "more": Canary()}, "evil.ckpt")
    else:
        (tmp_path / "evil.ckpt").write_bytes(pickle.dumps(Canary()))
    code, _, err = convert("evil.ckpt", "out.safetensors", "--trust-pickle")
    assert (code, err.count("\n")) == (7, 1)
    assert "holds more than tensors" in err
    assert [path.name for path in tmp_path.iterdir()] == ["evil.ckpt"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("{sd1}", "copy"), 2, "is a folder already: say what is to change"),
        (("{sd1}", "copy", "--dtype", "int8"), 2, "Invalid value for '--dtype'"),
        (("none", "copy"), 4, "no such model folder"),
        (("x.ckpt", "y.safetensors", "--trust-pickle", "--to", "kohya"), 2, "convert its output by --to kohya"),
        (("{sd1}", "copy", "--dtype", "float16", "-m", "x"), 2, "--model requires --to peft or --to kohya"),
        (("x.ckpt", "y.safetensors", "--trust-pickle", "--variant", "fp16"), 2, "--variant applies to models"),
        (("{sd1}", "--to", "openvino", "-m", "x"), 2, "--model requires --to peft or --to kohya"),
        (("none.safetensors", "copy"), 4, "no such"),
        (
            ("there.safetensors", "copy"),
            4,
            "there.safetensors is an adapter, not a model. Load it with --lora, convert it with --to",
        ),
        (("{sd1}/model_index.json", "copy"), 4, "is not a safetensors file"),
        (("{tiny}", "one.safetensors"), 2, "which a single file"),
        (("{sd1}", "there.safetensors"), 2, "exists; nothing is overwritten"),
        (("{sd1}", "x.safetensors", "--trust-pickle"), 2, "--trust-pickle requires a pickle"),
        (("there.safetensors", "x", "--to", "kohya"), 2, "the output is a file: name it x.safetensors"),
    ],
    ids=str,
)
def test_refused_conversions(convert, sd1, tiny_model, tmp_path, words, code, message):
    save_file({"lora_unet_conv_in.lora_down.weight": torch.zeros(1)}, tmp_path / "there.safetensors")
    filled = [word.format(sd1=sd1, tiny=tiny_model) for word in words]
    result, _, err = convert(*filled)
    assert (result, err.count("\n")) == (code, 1)
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["there.safetensors"]


def test_a_saved_model_is_silent_of_where_it_lay(tiny_model, tmp_path):
    pipe = LatentDiffusionPipeline.from_pretrained(tiny_model, device="cpu")
    pipe.save_pretrained(tmp_path / "saved")
    texts = [path.read_text() for path in (tmp_path / "saved").rglob("*.json") if path.parent.name != "tokenizer"]
    assert len(texts) >= 5
    assert not any(str(tiny_model) in text or "_name_or_path" in text for text in texts)
