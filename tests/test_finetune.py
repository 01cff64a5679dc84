"""Fine-tuning whole: by every method a command, its results in our pipeline and in diffusers', kills, bad input."""

import json
import os
import shutil
import signal
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import ControlNetModel, StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from latentdiff import LatentDiffusionPipeline
from latentdiff.data.dataset import open_data
from latentdiff.networks.controls.controlnet import ControlNet
from latentdiff.stages.finetune import _stages, load_settings_and_model
from latentdiff.stages.methods import begin
from latentdiff.stages.run import Run

from . import stable_diffusion
from .forked import KILL, Started
from .pictures import as_jsonl, some_pictures, write_pictures

PROMPT = "a red circle"
QUICK = (
    *("--steps", 4, "--train-batch-size", 2, "--gradient-accumulation-steps", 2, "--checkpointing-steps", 1),
    *("--validation-steps", 4, "--lr", 1e-2, "--set", "previews.count=2", "--set", "previews.num_inference_steps=1"),
)
METHODS = {
    "full": ("--method", "full", "--train-text-encoder"),
    "lora": ("--method", "lora", "--rank", 2, "--kohya", "--snr-gamma", 5, "--train-text-encoder"),
    "dreambooth": (
        *("--method", "dreambooth", "--rank", 2, "--class-prompt", "a star", "--instance-prompt", "a sks star"),
        *("--num-class-images", 3),
    ),
    "textual-inversion": ("--method", "textual-inversion", "--token", "<ink>", "--initial", "star", "--num-vectors", 2),
    "controlnet": ("--method", "controlnet", "--annotator", "tile"),
    "ip-adapter": ("--method", "ip-adapter"),
    "consistency": ("--method", "consistency", "--rank", 2),
}
CAPTIONED = ("full", "lora", "controlnet", "ip-adapter", "consistency")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Captioned ones, and the same without captions."""
    root = tmp_path_factory.mktemp("pictures")
    as_jsonl(root / "captioned", some_pictures(9))
    write_pictures(root / "bare", some_pictures(5))
    return root


def source(pictures, method):
    return pictures / ("captioned" if method in CAPTIONED else "bare")


@pytest.fixture
def finetune(call, tiny_model):
    """The command in this process: exit code, stdout and stderr."""
    return lambda data, output, *words, model=tiny_model: call("finetune", model, data, "-o", output, *words)


def begun(model, pictures, folder, method, hook=None):
    """The command in a process of its own."""
    words = ("finetune", model, source(pictures, method), "-o", folder, *METHODS[method], *QUICK)
    return Started(*words, hook=hook)


def result_of(folder, method):
    """The tensors of what was learnt."""
    if method in ("lora", "dreambooth", "consistency"):
        return load_file(folder / "pytorch_lora_weights.safetensors")
    if method == "textual-inversion":
        return load_file(folder / "learned_embeds.safetensors")
    if method == "controlnet":
        return load_file(folder / "controlnet" / "diffusion_pytorch_model.safetensors")
    if method == "ip-adapter":
        return load_file(folder / "ip_adapter" / "ip_adapter.safetensors")
    parts = {"unet": "diffusion_pytorch_model", "text_encoder": "model"}
    files = {part: load_file(folder / "model" / part / f"{name}.safetensors") for part, name in parts.items()}
    return {f"{part}.{name}": tensor for part, state in files.items() for name, tensor in state.items()}


def draw(pipe, prompt=PROMPT, **more):
    return pipe(prompt, seed=1, num_inference_steps=2, output_type="latent", **more).images


def _check_control(folder, plain, alone):
    """diffusers loads it; before its first step it is the U-Net's encoder and adds nothing, to the bit."""
    ControlNetModel.from_pretrained(folder)
    unet = plain.model.backbone.model
    fresh = ControlNet.create(unet, plain.model.codec.factor).eval()
    assert torch.equal(fresh.model.conv_in.weight, unet.conv_in.weight)
    pipe = LatentDiffusionPipeline(plain.model)
    pipe._painter = replace(pipe.painter, controls=(fresh,))
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    assert torch.equal(draw(pipe, control_image=noise), alone)


def _check_image_prompt(folder, taught, model):
    """diffusers loads it with its image encoder, and draws the same picture."""
    theirs = StableDiffusionPipeline.from_pretrained(model, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    theirs.load_ip_adapter(str(folder), subfolder="ip_adapter", weight_name="ip_adapter.safetensors")
    taught.load_ip_adapter(folder / "ip_adapter")
    size = taught.model.codec.shape((64, 64))
    options = {"latents": torch.randn(1, *size, generator=torch.Generator().manual_seed(0)), "num_inference_steps": 2}
    options |= {"ip_adapter_image": Image.new("RGB", (64, 64), "red"), "guidance_scale": 3.0, "output_type": "np"}
    expected = theirs(PROMPT, **options).images
    own = taught(PROMPT, sampler="ddim", spacing="trailing", **options).images
    assert np.abs(own - expected).max() < 1e-3


SLOW = [
    pytest.param(method, marks=pytest.mark.slow)
    for method in ("full", "dreambooth", "textual-inversion", "consistency")
]


@pytest.mark.parametrize("method", ["lora", "controlnet", "ip-adapter", *SLOW])
def test_a_method_from_command_to_picture(finetune, call, pictures, tmp_path, tiny_model, method):
    """What is written changes the picture; what is not taught stays, to the bit; the page and the card say how."""
    code, out, err = finetune(source(pictures, method), "out", *METHODS[method], *QUICK)
    assert code == 0, err
    folder = tmp_path / "out"
    paths = [path.removeprefix("out/") for path in out.split()]
    names = {"full": "model", "textual-inversion": "learned_embeds.safetensors", "controlnet": "controlnet"}
    names["ip-adapter"] = "ip_adapter"
    result = names.get(method, "pytorch_lora_weights.safetensors")
    kohya = ["out-kohya.safetensors"] if method == "lora" else []
    for name in kohya:
        with safe_open(folder / name, "pt") as file:
            metadata = file.metadata()
        assert (metadata["ss_network_dim"], metadata["ss_steps"], metadata["ss_min_snr_gamma"]) == ("2", "4", "5.0")
        assert metadata["modelspec.prediction_type"] == "v"
        assert metadata["ss_base_model"] == tiny_model.name, "no folder of this machine"
    assert paths == [result, *kohya, "report.html", "README.md"]
    mask = os.umask(0)
    os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*.safetensors")} == {0o666 & ~mask}
    plain = LatentDiffusionPipeline.from_pretrained(tiny_model, device="cpu")
    prompt = "a <ink>" if method == "textual-inversion" else PROMPT
    if method == "full":
        taught = LatentDiffusionPipeline.from_pretrained(folder / "model", device="cpu")
        StableDiffusionPipeline.from_pretrained(folder / "model")
        vae = "vae/diffusion_pytorch_model.safetensors"
        assert (folder / "model" / vae).read_bytes() == (tiny_model / vae).read_bytes()
        assert (folder / "model" / "clip").is_dir()
    else:
        taught = LatentDiffusionPipeline.from_pretrained(tiny_model, device="cpu")
    if method == "textual-inversion":
        assert taught.load_textual_inversion(folder) == ["<ink>"]
        assert result_of(folder, method)["<ink>"].shape == (2, 32)
    elif method == "controlnet":
        _check_control(folder / "controlnet", plain, draw(plain))
        taught.load_controlnet(folder / "controlnet")
    elif method == "ip-adapter":
        _check_image_prompt(folder, taught, tiny_model)
    elif method != "full":
        fit = taught.load_lora_weights(folder)
        assert (fit.unused, fit.missing) == ([], [])
    black = np.zeros((64, 64, 3), np.uint8)
    hint = {"controlnet": {"control_image": black}, "ip-adapter": {"ip_adapter_image": black}}.get(method, {})
    assert (draw(taught, prompt, **hint) - draw(plain, prompt)).abs().max() > 1e-4
    log = [json.loads(line) for line in (folder / "finetune" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [0, 1, 2, 3, 4, 4], "a validation before the first step and at the end"
    assert log[0]["validation_loss"] != log[-1]["validation_loss"]
    assert "clip_score" not in log[0], "the model's CLIP has never seen these words"
    if method == "lora":
        kinds = [json.loads(call("info", path)[1]) for path in (folder, folder / "pytorch_lora_weights.safetensors")]
        assert kinds[0] == kinds[1]
    strip = np.asarray(picture := Image.open(folder / "strip.png"))
    count = 4 if method == "dreambooth" else 2
    assert strip.shape == (2 * 64, count * 64, 3), "a row before, a row after"
    page, card = (folder / "report.html").read_text(), (folder / "README.md").read_text()
    view = json.loads(picture.text["Description"])
    assert (view["steps"], len(view["prompts"])) == ([0, 4], count)
    assert all(f"{prompt}" in card for prompt in view["prompts"])
    assert "Rows: steps 0, 4. Columns: " in card
    students = count if method == "consistency" else 0  # a sheet for each prompt beside its teacher
    assert (page.count("before, after"), page.count("data:image/png")) == (count, count + students)
    assert page.count('class="small"') == count
    assert page.count("data:image/svg+xml") == 1
    assert f"{log[0]['validation_loss']:.4f} -> {log[-1]['validation_loss']:.4f}" in card
    assert str(pictures) not in page + card


@pytest.mark.parametrize("method", ["lora", *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS if m != "lora")])
def test_killed_and_gone_on_with(pictures, tmp_path, tiny_model, method):
    """SIGKILL in the middle of an accumulated step: the same bits in the end."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    code, err = begun(tiny_model, pictures, whole, method).ended()
    assert code == 0, err
    assert begun(tiny_model, pictures, cut, method, in_taught_loss).ended()[0] == -signal.SIGKILL
    assert not list(cut.glob("*.safetensors"))
    code, err = begun(tiny_model, pictures, cut, method).ended()
    assert code == 0, err
    assert "2 of 4 steps from step-2" in err
    expected, outcome = result_of(whole, method), result_of(cut, method)
    assert expected.keys() == outcome.keys()
    assert all(torch.equal(expected[name], outcome[name]) for name in expected)
    last = "finetune/checkpoints/step-00000004"
    for name in ("ema", "optimizer"):
        one, other = (load_file(run / last / f"{name}.safetensors") for run in (whole, cut))
        assert all(torch.equal(one[key], other[key]) for key in one)


def in_taught_loss():
    """In the third step, between its two parts."""
    from latentdiff.training.consistency import ConsistencyStage
    from latentdiff.training.denoiser import DenoiserStage

    calls = [0]

    def counting(original):
        def counted(self, module, batch):
            calls[0] += module.training and self._draws.purpose == "training"
            if calls[0] == 6:
                KILL()
            return original(self, module, batch)

        return counted

    for stage in (DenoiserStage, ConsistencyStage):
        stage.loss = counting(stage.loss)


def test_it_is_found_again_and_refused(finetune, pictures, tmp_path, tiny_model):
    """A run goes on with its own model, data and method only; another of the same family is another."""
    words = (*METHODS["lora"], *QUICK)
    assert finetune(pictures / "captioned", "out", *words)[0] == 0
    before = result_of(tmp_path / "out", "lora")
    code, _, err = finetune(pictures / "captioned", "out", *words)
    assert code == 0
    assert "0 of 4 steps" in err
    assert all(torch.equal(before[name], tensor) for name, tensor in result_of(tmp_path / "out", "lora").items())
    code, _, err = finetune(pictures / "captioned", "out", *words, "--set", "lora.rank=4")
    assert (code, "cannot resume: lora.alpha 2.0 -> 4.0; lora.rank 2 -> 4" in err) == (2, True)
    settings = (tmp_path / "out" / "finetune.toml").read_text()
    code, _, err = finetune(pictures / "bare", "out", *words, "--instance-prompt", "a star")
    assert (code, "cannot resume: dataset changed (9 -> 5 images)" in err) == (2, True)
    stable_diffusion.pipeline("1").save_pretrained(tmp_path / "sd")
    code, _, err = finetune(pictures / "captioned", "out", *words, "--resolution", 64, model=tmp_path / "sd")
    assert code == 4
    assert "belongs to other networks than the run's" in err.splitlines()[-1]
    assert not list((tmp_path / "out" / "finetune" / "checkpoints").glob("aside-*"))
    assert (tmp_path / "out" / "finetune.toml").read_text() == settings, "a start that is refused leaves them"


@pytest.mark.slow
def test_other_prompts_on_the_way(finetune, pictures, tmp_path):
    """A page compares pictures of the same prompts: rows of others are kept beside.

    The model's CLIP scores pictures of words that it knows.
    """
    words = (*METHODS["lora"], *QUICK)
    assert finetune(pictures / "captioned", "out", *words)[0] == 0
    more = ("--validation-prompt", "a ring", "--validation-prompt", "a star", "--validation-prompt", "a red circle")
    code, _, err = finetune(
        pictures / "captioned", "out", *words, *more, "--set", "finetune.training.max_train_steps=6"
    )
    assert code == 0, err
    stage = tmp_path / "out" / "finetune"
    assert sorted(path.name for path in (stage / "samples-1").glob("*.png")) == [
        "step-00000000.png",
        "step-00000004.png",
    ]
    assert [path.name for path in (stage / "samples").glob("*.png")] == ["step-00000006.png"]
    assert np.asarray(Image.open(tmp_path / "out" / "strip.png")).shape == (64, 3 * 64, 3)
    log = [json.loads(line) for line in (stage / "log.jsonl").read_text().splitlines()]
    scored = {line["step"]: abs(line["clip_score"]) <= 1 for line in log if "clip_score" in line}
    assert scored == {6: True}
    shutil.rmtree(stage / "samples")
    assert finetune(pictures / "captioned", "out", *words, *more, "--steps", 6)[0] == 0
    assert "data:image/png" not in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
def test_a_class_picture_that_is_missing(finetune, pictures, tmp_path):
    words = (*METHODS["dreambooth"], *QUICK)
    assert finetune(pictures / "bare", "out", *words)[0] == 0
    (tmp_path / "out" / "classes" / "00001.png").unlink()
    code, _, err = finetune(pictures / "bare", "out", *words)
    assert code == 3
    assert err.splitlines()[-1].startswith("error: class picture 00001.png is missing (out/classes)")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("{bare}", "--method", "lora"), 3, "5 images have no caption: 000.png, 001.jpg"),
        (("{captioned}", "--rank", 0), 2, 'finetune: key "lora.rank": must be at least 1 (got 0)'),
        (("{captioned}", "--method", "dreambooth"), 2, "dreambooth requires prior.prompt (--class-prompt)"),
        (("{captioned}", "--method", "textual-inversion"), 2, "requires word.token"),
        (("{bare}", "--method", "textual-inversion", "--token", "star"), 2, "the initial words are empty"),
        (("none",), 3, "none"),
        (("",), 2, "the data is empty"),
        (
            ("{captioned}", "--instance-prompt", "a star"),
            2,
            "the instance prompt is the caption of pictures that have none",
        ),
        (("{bare}", "--method", "textual-inversion", "--token", "a b"), 2, "hold no space and no slash (got 'a b')"),
        (("{captioned}", "--resolution", 63), 2, "pictures would be 63x63, not of multiples of 2"),
        (("{captioned}", "--validation-pictures", 9), 3, "9 of 9 images are held out"),
        (("{captioned}", "--learning-rat", 1), 2, "No such option: --learning-rat"),
        (("{captioned}", "--set", "finetune.weightin=p2"), 2, "did you mean weighting?"),
        (("{captioned}", "--config", "none.toml"), 2, "cannot read config (none.toml)"),
        (("{captioned}", "--resume", "latest"), 4, "no checkpoint in out/finetune/checkpoints"),
        (("{captioned}", "--use-8bit-adam"), 2, "requires bitsandbytes"),
        (("{captioned}", "-o", "{captioned}"), 2, "is not a run of `latentdiff finetune` (000.png is in it)"),
        (("{captioned}", "-o", "trained"), 2, "trained holds another run, of `latentdiff train`"),
        (("{captioned}", "-o", "/proc/x"), 2, "cannot write to /proc/x"),
    ],
    ids=str,
)
def test_bad_input(finetune, pictures, tmp_path, words, code, message):
    """One line, the right code, and nothing is begun."""
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "config.toml").touch()
    data, *more = [str(word).format(bare=pictures / "bare", captioned=pictures / "captioned") for word in words]
    outcome, out, err = finetune(data, "out", *more)
    assert (outcome, out) == (code, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert message in err.splitlines()[-1]
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_no_model_and_no_inpainting_model(finetune, pictures, tmp_path):
    code, _, err = finetune(pictures / "captioned", "out", model="nowhere")
    assert (code, err) == (
        4,
        "error: no such model folder (nowhere). Give a folder with a model_index.json, or a .safetensors\n",
    )
    stable_diffusion.pipeline("1", inpainting=True).save_pretrained(tmp_path / "nine")
    code, _, err = finetune(pictures / "captioned", "out", "--resolution", 64, model=tmp_path / "nine")
    assert (code, err.splitlines()[-1]) == (
        2,
        "error: fine-tuning an inpainting model is not supported: give the plain model that it comes from",
    )


def test_the_plan_alone(finetune, pictures, tmp_path):
    """With the time and the memory of a step; nothing is written."""
    code, out, err = finetune(pictures / "captioned", "out", *METHODS["lora"], "--dry-run", "--steps", 1000)
    assert (code, out) == (0, "")
    assert "by lora, rank 2, alpha 2, learning rate 0.001" in err
    assert "1,000 of 1,000 steps to train" in err
    assert "for frozen weights" in err
    assert "a step takes" in err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


QUICKEST = (("1", True), ("XL", False))
EACH = [
    pytest.param(*one, marks=() if one in QUICKEST else pytest.mark.slow)
    for one in product(stable_diffusion.FAMILIES, (False, True))
]


@pytest.mark.parametrize(("family", "reads"), EACH)
def test_the_loss_is_diffusers(pictures, tmp_path, family, reads):
    """The loss of a batch against diffusers' own networks and noise, SDXL's pooled text and sizes with it."""
    theirs = stable_diffusion.pipeline(family)
    theirs.save_pretrained(tmp_path / "model")
    overrides = ("data.kind=pictures", f"data.pictures.source={pictures / 'captioned'}", f"model={tmp_path / 'model'}")
    overrides = (*overrides, "method=full", "image_size=64", f"finetune.tune_text_encoder={str(reads).lower()}")
    config, pipe = load_settings_and_model(None, (*overrides, "finetune.caption_dropout=0.4"))
    run = Run(config, tmp_path / "out", Accelerator(cpu=True), open_data(config), {})
    taught = begin(pipe, config)
    stage, _ = _stages(run, pipe, taught, None)
    batch = stage.batch(range(6))
    outcome = stage.loss(taught.module, batch)
    texts = stage._samples.captions.conditions(batch)
    mean, log_variance = stage._samples.latents.moments(batch)
    x0 = mean + (0.5 * log_variance).exp() * batch["posterior"]
    noisy = theirs.scheduler.add_noise(x0, batch["noise"], batch["t"])
    keys = [stage._order.key(position) for position in range(6)]
    kept = [bool(stage._draws.of(row, epoch, (4, 8, 8))["kept"]) for row, epoch in keys]
    assert len(set(kept)) == 2
    captions = [run.data.training.caption(*key) if keep else "" for key, keep in zip(keys, kept, strict=True)]
    if family == "XL":
        context, pooled = _sdxl_texts(theirs, captions)
        sizes = torch.tensor([_sizes(run.data.training, *key) for key in keys])
        added = {"text_embeds": pooled, "time_ids": sizes}
        assert torch.equal(texts["sizes"], sizes.float())
    else:
        context = theirs.encode_prompt(captions, "cpu", 1, False)[0]
        added = None
    output = theirs.unet(noisy, batch["t"], context, added_cond_kwargs=added).sample
    velocity = theirs.scheduler.config.prediction_type == "v_prediction"
    target = theirs.scheduler.get_velocity(x0, batch["noise"], batch["t"]) if velocity else batch["noise"]
    expected = ((output - target) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(outcome, expected, rtol=3e-3 if not reads else 1e-4, atol=1e-4)


def _sdxl_texts(theirs, captions):
    """Prompt by prompt; the empty one is zeros, as at sampling."""
    outcome = [theirs.encode_prompt(caption, device="cpu", do_classifier_free_guidance=False) for caption in captions]
    blank = [not caption for caption in captions]
    tokens = torch.cat([one[0] * (not empty) for one, empty in zip(outcome, blank, strict=True)])
    return tokens, torch.cat([one[2] * (not empty) for one, empty in zip(outcome, blank, strict=True)])


def _sizes(examples, row, epoch):
    """By the picture's own size: resized to 64 along its shorter side, the middle shown."""
    height, width = examples.pictures.picture(row).facts.size
    scale = min(height, width) / 64
    top, left = (round((side / scale - 64) / 2) for side in (height, width))
    return [height, width, top, left, 64, 64]
