"""The student of few steps in a model's folder, and adapters in compiled networks: the weights are torch's."""

import base64
import io
import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from latentdiff import LatentDiffusionPipeline
from latentdiff.core.errors import ConfigError, ModelError
from latentdiff.data.folder import listing
from latentdiff.data.source import Options
from latentdiff.drawing.extras import adaptable_networks
from latentdiff.drawing.record import read_metadata
from latentdiff.families.loading import stored_model
from latentdiff.runtime import merging
from latentdiff.runtime.export import export
from latentdiff.server.shelf import Shelf, Wanted

from . import stable_diffusion
from .serving import Served, get, png

PROMPT = "a red circle above a blue square"
OPTIONS = {"prompt": PROMPT, "seed": 3, "output_type": "uint8"}


def factors(model, seed, ends=("to_q", "conv1", "q_proj")):
    """Factors beside some layers of a model's U-Net and text encoders, as PEFT writes them."""
    draw, state = partial(torch.randn, generator=torch.Generator().manual_seed(seed)), {}
    for part, network in adaptable_networks(model).items():
        for name, layer in network.named_modules():
            if name.endswith(ends):
                weight = layer.weight
                state[f"{part}.{name}.lora_A.weight"] = 0.2 * draw(2, *weight.shape[1:])
                state[f"{part}.{name}.lora_B.weight"] = 0.2 * draw(len(weight), 2, *[1] * (weight.ndim - 2))
    assert {name.partition(".")[0] for name in state} == adaptable_networks(model).keys()
    return state


@pytest.fixture(scope="module")
def place(compiled_model, tmp_path_factory):
    """A copy of the tiny model with a student, one without, and two adapters."""
    folder, model = tmp_path_factory.mktemp("few"), stored_model(compiled_model)
    for name in ("model", "bare"):
        shutil.copytree(compiled_model, folder / name)
    student = folder / "model" / "few_steps" / "pytorch_lora_weights.safetensors"
    student.parent.mkdir()
    save_file(factors(model, 0), student)
    for seed in (1, 2):
        save_file(factors(model, seed), folder / f"{seed}.safetensors")
    return folder


def opened(place, runtime, **settings):
    return LatentDiffusionPipeline.from_pretrained(
        place / "model", runtime=runtime, device="cpu", torch_dtype="float32", **settings
    )


def test_the_student_draws(place):
    """In four steps without guidance, by both runtimes: the same as its adapter loaded by hand."""
    by_hand = opened(place, "torch")
    by_hand.load_lora_weights(place / "model" / "few_steps", fuse=True)
    expected = by_hand(preset="lcm", **OPTIONS).images.astype(int)
    for runtime in ("torch", "openvino"):
        pipe = opened(place, runtime)
        plain = pipe(num_inference_steps=4, **OPTIONS).images
        pipe.load_few_steps()
        out = pipe(**OPTIONS)
        assert (pipe.runtime, out.metadata[0].runtime, out.metadata[0].steps) == (runtime, runtime, (4,))
        assert np.abs(out.images - expected).max() <= (runtime == "openvino")
        assert np.abs(plain.astype(int) - expected).max() > 10
        assert [(each.kind, each.path) for each in out.metadata[0].sources] == [("few-steps", "")]
        pipe.load_few_steps()
        assert (pipe(**OPTIONS).images == out.images).all(), "loaded once"


def test_torch_takes_the_student_along(place):
    pipe = opened(place, "auto")
    pipe.load_few_steps()
    first = pipe(**OPTIONS).images.astype(int)
    with pytest.warns(UserWarning, match="vae_tiling requires torch"):
        again = pipe(vae_tiling=True, **OPTIONS).images
    assert pipe.runtime == "torch"
    assert np.abs(again - first).max() <= 1


def test_without_a_student(place):
    assert opened(place, "auto").has_few_steps
    bare = LatentDiffusionPipeline.from_pretrained(place / "bare", device="cpu")
    assert not bare.has_few_steps
    with pytest.raises(ConfigError, match="scenes-tiny has no student of few steps in its folder"):
        bare.load_few_steps()


def test_adapters_in_compiled_networks(place):
    """One after the other, each with its weight: the weights, and so the pictures, are torch's."""
    pictures = {}
    for runtime in ("torch", "openvino"):
        pipe = opened(place, runtime)
        fit = pipe.load_lora_weights(place / "1.safetensors", weight=0.7, fuse=True)
        one = pipe(num_inference_steps=3, **OPTIONS).images.astype(int)
        pipe.load_lora_weights(place / "2.safetensors", weight=-0.5, fuse=True)
        both = pipe(num_inference_steps=3, **OPTIONS)
        assert both.metadata[0].runtime == runtime
        assert [(each.kind, each.weight) for each in both.metadata[0].sources] == [("merged", 0.7), ("merged", -0.5)]
        pictures[runtime] = fit.matched, one, both.images.astype(int)
    (matched, one, both), (own, mine, ours) = pictures["torch"], pictures["openvino"]
    assert matched == own
    assert np.abs(one - mine).max() <= 1
    assert np.abs(both - ours).max() <= 1
    assert np.abs(one - both).max() > 10


def test_torch_takes_adapters_along(place):
    pipe = opened(place, "auto")
    pipe.load_lora_weights(place / "1.safetensors", fuse=True)
    first = pipe(num_inference_steps=2, **OPTIONS).images.astype(int)
    assert pipe.runtime == "openvino"
    with pytest.warns(UserWarning, match="an adapter requires torch"):
        pipe.load_lora_weights(place / "2.safetensors", weight=0.0)
    assert np.abs(pipe(num_inference_steps=2, **OPTIONS).images - first).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("family", ["1", "2", "XL"])
def test_adapters_of_every_family_in_compiled_networks(family, tmp_path):
    stable_diffusion.pipeline(family).save_pretrained(tmp_path / "model")
    model = stored_model(tmp_path / "model")
    export(model, tmp_path / "model")
    save_file(factors(model, 0), tmp_path / "lora.safetensors")
    picture = []
    for runtime in ("torch", "openvino"):
        pipe = opened(tmp_path, runtime)
        pipe.load_lora_weights(tmp_path / "lora.safetensors", fuse=True)
        picture.append(pipe(num_inference_steps=2, height=64, width=64, **OPTIONS).images.astype(int))
    assert np.abs(picture[0] - picture[1]).max() <= 1


def test_on_the_command_line(place, call, tmp_path):
    code, _, err = call("generate", PROMPT, "-m", place / "model", "--fast", "-s", 3, "-o", "fast.png")
    assert code == 0, err
    record = read_metadata(tmp_path / "fast.png")["latentdiff"]
    assert record["sources"][0]["kind"] == "few-steps"
    assert record["runtime"] == "openvino"
    assert record["steps"] == [4]
    code, _, err = call("reproduce", "fast.png", "--model", place / "model")
    assert code == 0, err
    words = ("--fast", "--lora", f"{place / '1.safetensors'}:0.5", "--steps", 2, "-s", 3)
    code, _, err = call("generate", PROMPT, "-m", place / "model", *words, "-o", "both.png")
    assert code == 0, err
    kinds = [each["kind"] for each in read_metadata(tmp_path / "both.png")["latentdiff"]["sources"]]
    assert kinds == ["few-steps", "merged"]
    pipe = LatentDiffusionPipeline.from_pretrained(place / "model", device="cpu")
    pipe.load_few_steps()
    assert (np.asarray(Image.open("fast.png")) == pipe(**OPTIONS).images[0]).all()
    code, _, err = call("generate", PROMPT, "-m", place / "bare", "--fast", "-o", "no.png")
    assert (code, err.count("\n")) == (2, 1), err


def test_the_second_start_reads_no_adapter(place, tmp_path, monkeypatch):
    """The student's graphs are in the user's cache then: torch is not imported for its weights."""
    monkeypatch.setenv("LATENTDIFF_CACHE", str(tmp_path / "cache"))
    read, weights_of = [], merging.weights_of
    monkeypatch.setattr(merging, "weights_of", lambda *given: read.append(given) or weights_of(*given))
    picture = []
    for _ in range(2):
        pipe = opened(place, "openvino")
        pipe.load_few_steps()
        picture.append(pipe(**OPTIONS).images)
    assert len(read) == 1
    assert (picture[0] == picture[1]).all()


def test_a_file_that_changes(place, tmp_path):
    """A config beside an adapter is a part of it; a file that is another one when it is read again is refused."""
    shutil.copytree(place / "bare", tmp_path / "model")
    folder, state = tmp_path / "adapter", load_file(place / "1.safetensors")
    folder.mkdir()
    save_file({name: t for name, t in state.items() if name.startswith("unet.")}, folder / "adapter_model.safetensors")
    picture = {}
    for alpha in (2, 8):
        (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": alpha}))
        for runtime in ("openvino", "torch"):
            pipe = opened(tmp_path, runtime)
            pipe.load_lora_weights(folder, fuse=True)
            picture[alpha, runtime] = pipe(num_inference_steps=2, **OPTIONS).images.astype(int)
        assert np.abs(picture[alpha, "openvino"] - picture[alpha, "torch"]).max() <= 1
    assert np.abs(picture[2, "torch"] - picture[8, "torch"]).max() > 10
    student = tmp_path / "model" / "few_steps" / "pytorch_lora_weights.safetensors"
    student.parent.mkdir()
    shutil.copy(place / "1.safetensors", student)
    pipe = opened(tmp_path, "openvino")
    pipe.load_few_steps()
    shutil.copy(place / "2.safetensors", student)
    with pytest.raises(ModelError, match="few-steps was changed after it was loaded"):
        pipe(**OPTIONS)
    shutil.copy(place / "1.safetensors", tmp_path / "x.safetensors")
    pipe = opened(tmp_path, "auto")
    pipe.load_lora_weights(tmp_path / "x.safetensors", fuse=True)
    shutil.copy(place / "2.safetensors", tmp_path / "x.safetensors")
    for again in (
        lambda: pipe(vae_tiling=True, **OPTIONS),
        lambda: pipe.load_lora_weights(place / "2.safetensors", fuse=True),
    ):
        with pytest.raises(ModelError, match=r"x\.safetensors was changed after it was loaded"):
            again()


def test_saved_with_its_student(place, tmp_path):
    """The student stays with the weights that it belongs to, and with no others."""
    opened(place, "torch").save_pretrained(tmp_path / "saved")
    assert opened_at(tmp_path / "saved").has_few_steps
    opened_at(place / "bare").save_pretrained(tmp_path / "saved")
    assert not opened_at(tmp_path / "saved").has_few_steps
    for load in (
        lambda pipe: pipe.load_few_steps(),
        lambda pipe: pipe.load_lora_weights(place / "1.safetensors", fuse=True),
    ):
        pipe = opened(place, "torch")
        load(pipe)
        pipe.save_pretrained(tmp_path / "saved")
        assert not opened_at(tmp_path / "saved").has_few_steps


def opened_at(folder):
    return LatentDiffusionPipeline.from_pretrained(folder, runtime="torch", device="cpu")


def test_a_student_beside_others(place, compiled_model, tmp_path):
    """After an adapter of the usual file name; with words, or on quantized weights, it is refused."""
    (tmp_path / "lora").mkdir()
    shutil.copy(place / "1.safetensors", tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    picture = []
    for runtime in ("openvino", "torch"):
        pipe = opened(place, runtime)
        pipe.load_lora_weights(tmp_path / "lora" / "pytorch_lora_weights.safetensors", fuse=True)
        pipe.load_few_steps()
        picture.append(pipe(**OPTIONS).images.astype(int))
        assert [each.kind for each in pipe.painter.sources.values()] == ["merged", "few-steps"]
    assert np.abs(picture[0] - picture[1]).max() <= 1
    with pytest.raises(ConfigError, match="requires weights that are not quantized"):
        opened(place, "auto", quantize="int8").load_few_steps()
    shutil.copytree(place / "model", tmp_path / "model")
    width = stored_model(compiled_model).parts["text_encoder"].get_input_embeddings().weight.shape[1]
    words = {"bundle_emb.zork.string_to_param.*": torch.ones(1, width)}
    file = tmp_path / "model" / "few_steps" / "pytorch_lora_weights.safetensors"
    save_file(load_file(file) | words, file)
    for runtime in ("openvino", "torch"):
        pipe = opened(tmp_path, runtime)
        with pytest.raises(ModelError, match="cannot have learnt words"):
            pipe.load_few_steps()
            pipe(**OPTIONS)
    assert (pipe(**OPTIONS).images == opened(place, "torch")(**OPTIONS).images).all()


def test_two_adapters_of_one_name(place, call, tmp_path):
    words = ["generate", PROMPT, "-m", place / "bare", "--steps", 2, "-s", 1, "-o", "two.png"]
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        shutil.copy(place / f"{number}.safetensors", tmp_path / str(number) / "pytorch_lora_weights.safetensors")
        words += ["--lora", f"{number}/pytorch_lora_weights.safetensors:0.5"]
    assert call(*words)[0] == 0
    code, _, err = call("reproduce", "two.png", "--model", place / "bare")
    assert code == 0, err


def test_drawing_while_typing(place, tmp_path):
    """The server draws with the student and keeps nothing; another request is drawn by the plain model."""
    pipe = opened(place, "torch")
    with Served(pipe, tmp_path / "outputs", shelf=_shelf(place, pipe)) as server:
        answer = server.post("/api/live", {"prompt": PROMPT, "seed": "3"})
        assert answer.status_code == 200, answer.text
        picture = _decoded(answer.json()["image"])
        assert list((tmp_path / "outputs").glob("*.png")) == []
        assert server.post("/api/live", {"prompt": PROMPT, "seed": "-3"}).status_code == 422
        assert server.post("/api/live", {"prompt": PROMPT, "steps": 3}).status_code == 422
        assert server.post("/api/live", {"prompt": PROMPT, "width": 7}).status_code == 422
        assert get(f"{server.address}/api/models/scenes-tiny").json()["live"]
    student = opened(place, "torch")
    student.load_few_steps()
    assert (picture == student(**OPTIONS).images[0]).all()


def test_a_student_that_is_replaced_is_another_one(place, tmp_path):
    """The server draws with the file that is there; the one that was replaced is not drawn with from memory."""
    model = shutil.copytree(place / "model", tmp_path / "model")
    pipe = LatentDiffusionPipeline.from_pretrained(model, device="cpu", runtime="torch")
    shelf = Shelf(pipe, lambda *_: LatentDiffusionPipeline.from_pretrained(model, device="cpu", runtime="torch"))
    wanted = Wanted(pipe.card.name, fast=True)
    picture = [shelf.take(wanted)(**OPTIONS).images]
    assert shelf.loaded(wanted) is shelf.take(wanted)
    other = tmp_path / "other.safetensors"
    save_file(factors(pipe.model, 5), other)
    other.rename(model / "few_steps" / "pytorch_lora_weights.safetensors")
    assert shelf.loaded(wanted) is None
    picture.append(shelf.take(wanted)(**OPTIONS).images)
    assert np.abs(picture[0].astype(int) - picture[1]).max() > 1


def _shelf(place, pipe):
    return Shelf(pipe, lambda *_: opened(place, "torch"))


def _decoded(address):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))))


def test_the_models_own_pictures(place, call, tmp_path):
    """What it draws is a data set: the captions are the prompts in the records."""
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo green stars\n")
    words = ("--prompts-file", "prompts.txt", "-m", place / "model", "--steps", 1, "-s", 1, "-N", 2, "-o", "drawn")
    assert call("generate", *words)[0] == 0
    plain = png(Image.new("RGB", (8, 8)))
    huge = plain[:16] + (40000).to_bytes(4) * 2 + plain[24:]
    for number, content in enumerate((plain, huge, plain[:40], b"no picture")):
        (tmp_path / "drawn" / f"other{number}.png").write_bytes(content)
    result = listing(tmp_path / "drawn", Options(layout="drawn"))
    captions = sorted(record.captions for record in result.records)
    assert captions == [
        (),
        (),
        (),
        (),
        ("a red circle",),
        ("a red circle",),
        ("two green stars",),
        ("two green stars",),
    ]
