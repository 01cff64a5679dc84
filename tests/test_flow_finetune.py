"""Fine-tuning the transformers of flow-matching families: the loss falls, a killed run goes on to the same bits."""

import json
import signal

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from latentdiff.training.denoiser import DenoiserStage

from . import flow_models, flux, stable_diffusion_3
from .forked import KILL, Started
from .pictures import as_jsonl, some_pictures
from .stable_diffusion import load

MAKERS = {
    "Z-Image": lambda: flow_models.pipeline("Z-Image"),
    "FLUX.2 klein": lambda: flow_models.pipeline("FLUX.2 klein"),
    "Qwen-Image": lambda: flow_models.pipeline("Qwen-Image"),
    "Flux.1": flux.pipeline,
    "Stable Diffusion 3": stable_diffusion_3.pipeline,
}
QUICK = (
    *("--steps", 4, "--train-batch-size", 2, "--checkpointing-steps", 1, "--resolution", 64, "--lr", 1e-2),
    *("--validation-steps", 4, "--set", "previews.count=1", "--set", "previews.num_inference_steps=1"),
)


EACH = [pytest.param(name, marks=() if name == "Z-Image" else pytest.mark.slow) for name in MAKERS]


@pytest.fixture(scope="module", params=EACH)
def folder(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("flow") / request.param.replace(" ", "-")
    MAKERS[request.param]().save_pretrained(place)
    return place


@pytest.fixture
def data(tmp_path):
    as_jsonl(tmp_path / "captioned", some_pictures(6))
    return tmp_path / "captioned"


def losses(run):
    log = [json.loads(line) for line in (run / "finetune" / "log.jsonl").read_text().splitlines()]
    return [line["validation_loss"] for line in log if "validation_loss" in line]


def test_a_lora_is_learnt_and_drawn_with(folder, data, call, tmp_path):
    """The validation loss falls; the file changes the picture, here and in diffusers, which finds every layer."""
    code, _, err = call("finetune", folder, data, "-o", tmp_path / "run", "--rank", 4, *QUICK)
    assert code == 0, err
    first, last = losses(tmp_path / "run")
    assert last < first
    file = tmp_path / "run" / "pytorch_lora_weights.safetensors"
    pipe = load(folder)
    options = {"seed": 1, "num_inference_steps": 2, "width": 64, "height": 64, "output_type": "pt"}
    plain = pipe("a red circle", **options).images
    fit = pipe.load_lora_weights(file)
    assert (fit.unused, fit.missing) == ([], [])
    assert (pipe("a red circle", **options).images - plain).abs().max() > 1e-4
    theirs = DiffusionPipeline.from_pretrained(folder)
    theirs.load_lora_weights(file.parent, weight_name=file.name, adapter_name="x")
    result = {name for name, _ in theirs.transformer.named_parameters() if "lora_" in name}
    assert len(result) == len(load_file(file))


def test_all_weights(folder, data, call, tmp_path):
    code, _, err = call("finetune", folder, data, "-o", tmp_path / "run", "--method", "full", *QUICK)
    assert code == 0, err
    first, last = losses(tmp_path / "run")
    assert last < first
    DiffusionPipeline.from_pretrained(tmp_path / "run" / "model")
    before, after = (load(place).model.parts for place in (folder, tmp_path / "run" / "model"))
    changed = {}
    for part, module in before.items():
        if isinstance(module, torch.nn.Module):
            pairs = zip(module.parameters(), after[part].parameters(), strict=True)
            changed[part] = any(not torch.equal(one, other) for one, other in pairs)
    assert changed == {part: part == "transformer" for part in changed}


def test_what_is_cached_is_what_is_computed(data, call, tmp_path):
    """The same bits are learnt with and without a cache."""
    MAKERS["Qwen-Image"]().save_pretrained(tmp_path / "model")
    for name, words in (("cached", ()), ("plain", ("--set", "finetune.cache=false"))):
        code, _, err = call("finetune", tmp_path / "model", data, "-o", tmp_path / name, "--rank", 2, *QUICK, *words)
        assert code == 0, err
    one, other = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("cached", "plain"))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("kind", [*(pytest.param(k, marks=pytest.mark.slow) for k in ("int8", "fp8", "q8_0")), "q4_0"])
def test_factors_beside_quantized_weights(data, call, tmp_path, kind):
    """The loss falls, in bfloat16 too; the adapter is a usual one, which also changes the whole model's picture."""
    MAKERS["Flux.1"]().save_pretrained(tmp_path / "model")
    words = ("--rank", 4, "--quantize", kind, "--mixed-precision", "bf16", "--gradient-checkpointing", *QUICK)
    code, err = Started("finetune", tmp_path / "model", data, "-o", tmp_path / "run", *words).ended()
    assert (code, f"weights {kind}" in err) == (0, True), err
    first, last = losses(tmp_path / "run")
    assert last < first
    pipe = load(tmp_path / "model")
    options = {"seed": 1, "num_inference_steps": 1, "width": 64, "height": 64, "output_type": "pt"}
    plain = pipe("a red circle", **options).images
    fit = pipe.load_lora_weights(tmp_path / "run")
    assert (fit.unused, fit.missing) == ([], [])
    assert not torch.equal(pipe("a red circle", **options).images, plain)
    code, _, err = call("finetune", tmp_path / "model", data, "-o", tmp_path / "run", "--rank", 4, *QUICK)
    assert (code, f"quantize {kind} -> None" in err) == (2, True), err


@pytest.mark.parametrize("words", [("--method", "full"), ("--dora",), ("--train-text-encoder",)])
def test_weights_in_blocks_are_frozen(data, call, tmp_path, words):
    """Of a folder too; and a LoRA learns beside them."""
    MAKERS["Flux.1"]().save_pretrained(tmp_path / "model")
    assert call("convert", tmp_path / "model", tmp_path / "q8", "--quantize", "q8_0")[0] == 0
    code, _, err = call("finetune", tmp_path / "q8", data, "-o", tmp_path / "run", *QUICK, *words)
    assert (code, "quantized weights are frozen" in err) == (2, True), err
    if words == ("--dora",):
        assert call("finetune", tmp_path / "q8", data, "-o", tmp_path / "run", "--rank", 2, *QUICK)[0] == 0
        first, last = losses(tmp_path / "run")
        assert last < first


@pytest.mark.quick("numbers")
@pytest.mark.parametrize("further", [(), ("--quantize", "q4_0")], ids=["numbers", "blocks"])
def test_killed_and_gone_on_with(data, tmp_path, further):
    """SIGKILL in the third step: the same bits in the end."""
    MAKERS["Z-Image"]().save_pretrained(tmp_path / "model")

    def begun(name, hook=None):
        words = ("finetune", tmp_path / "model", data, "-o", tmp_path / name, "--rank", 2, *QUICK, *further)
        return Started(*words, hook=hook)

    code, err = begun("whole").ended()
    assert code == 0, err
    assert begun("cut", in_third_step).ended()[0] == -signal.SIGKILL
    code, err = begun("cut").ended()
    assert code == 0, err
    assert "2 of 4 steps from step-2" in err
    one, other = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("whole", "cut"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def in_third_step():
    calls = [0]
    original = DenoiserStage.loss

    def counted(self, module, batch):
        calls[0] += module.training and self._draws.purpose == "training"
        if calls[0] == 3:
            KILL()
        return original(self, module, batch)

    DenoiserStage.loss = counted


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--train-text-encoder",), "training the text encoder requires CLIP as the only text encoder"),
        (("--method", "textual-inversion", "--token", "<x>", "--initial", "red"), "a learnt word requires CLIP"),
        (("--method", "full", "--quantize", "q4_0"), "quantize requires frozen weights"),
        (("--dora", "--quantize", "int8"), "quantize requires frozen weights"),
        (("--method", "controlnet", "--quantize", "q8_0"), "quantize requires frozen weights"),
        (("--quantize", "int4"), "must be 'int8', 'fp8', 'q8_0' or 'q4_0' (got 'int4')"),
    ],
)
def test_what_cannot_be_taught_is_refused(data, call, tmp_path, words, message):
    MAKERS["Z-Image"]().save_pretrained(tmp_path / "model")
    code, _, err = call("finetune", tmp_path / "model", data, "-o", tmp_path / "run", *QUICK, *words)
    assert (code, message in err) == (2, True), err
    assert not list((tmp_path / "run").rglob("*.safetensors"))
