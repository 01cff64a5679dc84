"""ControlNets: the pictures are those of diffusers' pipelines, with the same weights and noise."""

import inspect
import json
import re
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    MultiControlNetModel,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLControlNetUnionPipeline,
    T2IAdapter,
)
from PIL import Image
from safetensors.torch import save_file

from latentdiff import LatentDiffusionPipeline
from latentdiff.core.annotators import ANNOTATORS, annotator
from latentdiff.core.errors import ConfigError, LatentDiffError, ModelError, UnsafeError
from latentdiff.data.companions import companions
from latentdiff.data.dataset import open_data
from latentdiff.diffusion.process import diffuse
from latentdiff.drawing.record import read_metadata
from latentdiff.families.controls import stored_control
from latentdiff.families.loading import stored_model
from latentdiff.formats.original import unet_name
from latentdiff.networks.controls.controlnet import ControlNet
from latentdiff.runtime.export import export, export_control
from latentdiff.stages.finetune import load_settings_and_model

from . import ip_adapters, stable_diffusion
from .stable_diffusion import load

PROMPT, NEGATIVE = "a castle on the hill", "blurry"
OURS = {"sampler": "ddim", "spacing": "trailing", "output_type": "np"}
OPTIONS = {"num_inference_steps": 5, "guidance_scale": 4.0}


def stirred(make, seed=7):
    """A network whose weights have all been moved: a fresh ControlNet adds zeros."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = make()
        for parameter in made.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return made


def control_of(unet, seed=7):
    return stirred(lambda: ControlNetModel.from_unet(unet), seed)


@pytest.fixture(scope="module", params=["1", pytest.param("2", marks=pytest.mark.slow), "XL"])
def place(request, tmp_path_factory):
    """A model, two ControlNets for it, and diffusers' parts."""
    folder = tmp_path_factory.mktemp("controls")
    base = stable_diffusion.pipeline(request.param)
    controls = [control_of(base.unet, seed) for seed in (7, 8)]
    base.save_pretrained(folder / "model")
    for index, control in enumerate(controls):
        control.save_pretrained(folder / f"control{index}")
    return folder, base, controls, request.param


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, size, np.uint8)) for size in ((48, 64, 3), (60, 50, 3))]


def noise(height=48, width=64):
    return torch.randn(1, 4, height // 8, width // 8, generator=torch.Generator().manual_seed(3))


def theirs(base, family, controls):
    kind = StableDiffusionXLControlNetPipeline if family == "XL" else StableDiffusionControlNetPipeline
    more = {"add_watermarker": False} if family == "XL" else {"requires_safety_checker": False}
    made = kind(**base.components, controlnet=controls, **more)
    made.set_progress_bar_config(disable=True)
    return made


SETTINGS = {
    "plain": {},
    "weak": {"controlnet_conditioning_scale": 0.4},
    "a part of the steps": {"control_guidance_start": 0.2, "control_guidance_end": 0.7},
    "guess mode": {"guess_mode": True},
    "guess mode, unguided": {"guess_mode": True, "guidance_scale": 1.0},
    "unguided": {"guidance_scale": 1.0},
}


@pytest.mark.quick(*(f"1-{name}" for name in SETTINGS), "XL-plain")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_as_diffusers_draws(place, pictures, settings):
    folder, base, controls, family = place
    options = {"negative_prompt": NEGATIVE, **OPTIONS, **settings, "height": 48, "width": 64, "latents": noise()}
    expected = theirs(base, family, controls[0])(PROMPT, image=pictures[1], output_type="np", **options).images
    ours = load(folder / "model")
    plain = ours(PROMPT, **{k: v for k, v in options.items() if k not in settings or k == "guidance_scale"}, **OURS)
    ours.load_controlnet(folder / "control0")
    sample = ours(PROMPT, control_image=pictures[1], **options, **OURS).images
    assert np.abs(sample - expected).max() < 1e-4
    assert np.abs(sample - plain.images).max() > 1e-3, "it steers"
    ours.unload_controlnets()
    assert (
        ours(PROMPT, **{**OPTIONS, "height": 48, "width": 64, "latents": noise()}, **OURS).images
    ).shape == sample.shape


@pytest.mark.quick("1")
def test_streamed_and_refined(place, pictures):
    """Every step under the control; a refiner goes on without it."""
    folder, *_ = place
    ours = load(folder / "model")
    ours.load_controlnet(folder / "control0")
    options = {"seed": 1, "control_image": pictures[1], "height": 48, "width": 64, **OPTIONS}
    *_, last = ours.stream(PROMPT, **options)
    assert torch.equal(last.x, torch.as_tensor(ours(PROMPT, output_type="latent", **options).images))
    with pytest.raises(ConfigError, match="0 control pictures, and 1 ControlNets are loaded"):
        next(ours.stream(PROMPT, **options | {"control_image": None}))
    controlled = [step.x for step in ours.stream(PROMPT, **options)]
    ours.load_refiner(folder / "model")
    refined = [step.x for step in ours.stream(PROMPT, refiner_switch=0.5, **options)]
    assert len(refined) == 5
    assert torch.equal(refined[1], controlled[1])
    assert not torch.equal(refined[-1], controlled[-1])
    del options["control_image"]
    plain = [step.x for step in load(folder / "model").stream(PROMPT, **options)]
    options |= {"control_image": pictures[1], "refiner_switch": 0.0001}
    assert torch.equal([step.x for step in ours.stream(PROMPT, **options)][-1], plain[-1]), "the refiner draws all"


@pytest.mark.quick("1")
def test_several_at_once(place, pictures):
    folder, base, controls, family = place
    each = {
        "controlnet_conditioning_scale": [0.7, 1.2],
        "control_guidance_start": [0.0, 0.4],
        "control_guidance_end": [0.8, 1.0],
    }
    options = {"negative_prompt": NEGATIVE, **OPTIONS, **each, "height": 48, "width": 64, "latents": noise()}
    pipe = theirs(base, family, MultiControlNetModel(controls))
    expected = pipe(PROMPT, image=pictures, output_type="np", **options).images
    ours = load(folder / "model")
    for index in range(2):
        ours.load_controlnet(folder / f"control{index}")
    sample = ours(PROMPT, control_image=pictures, **options, **OURS).images
    assert np.abs(sample - expected).max() < 1e-4


def test_over_a_picture(place, pictures):
    """The shares of the steps are of those that are left."""
    folder, base, controls, family = place
    if family != "1":
        pytest.skip("the control knows nothing of the start")
    made = StableDiffusionControlNetImg2ImgPipeline(
        **base.components, controlnet=controls[0], requires_safety_checker=False
    )
    made.set_progress_bar_config(disable=True)
    ours = load(folder / "model")
    ours.load_controlnet(folder / "control0")
    levels = ours.model.path.levels(10, "trailing")
    x = diffuse(ours.encode(np.asarray(pictures[0])[None]), noise(), levels[4])
    made.prepare_latents = lambda *_, **__: x  # theirs draws the posterior, and noise of its own
    shares = {"control_guidance_start": 0.3, "control_guidance_end": 0.9, "controlnet_conditioning_scale": 1.0}
    options = {"image": pictures[0], "num_inference_steps": 10, "guidance_scale": 3.0, "strength": 0.65, **shares}
    expected = made(PROMPT, control_image=pictures[1], height=48, width=64, output_type="np", **options).images
    sample = ours(PROMPT, control_image=pictures[1], latents=noise(), **options, **OURS).images
    assert np.abs(sample - expected).max() < 1e-4


@pytest.mark.slow
def test_in_every_other_way(place, pictures):
    """Beside an input picture with a mask, a second pass, other guidance, every sampler and speed."""
    folder, *_ = place
    ours = load(folder / "model")
    ours.load_controlnet(folder / "control0")
    mask = np.zeros((48, 64), np.uint8)
    mask[10:30, 20:50] = 255
    small = {"num_inference_steps": 3, "seed": 1, "output_type": "uint8"}
    for options in (
        {"image": pictures[0], "mask_image": mask},
        {"hires_scale": 2.0, "height": 48, "width": 64},
        {"pag_scale": 2.0, "height": 48, "width": 64},
        {"sampler": "heun", "height": 48, "width": 64, "guidance_rescale": 0.5},
        {"num_images_per_prompt": 3, "batch_size": 2, "height": 48, "width": 64},
    ):
        steered, free = (
            ours(PROMPT, control_image=pictures[1], controlnet_conditioning_scale=scale, **options, **small).images
            for scale in (1.0, 0.0)
        )
        alone = load(folder / "model")(PROMPT, **options, **small).images
        assert np.abs(free.astype(int) - alone).max() <= 1, "a scale of zero is no control"
        assert np.abs(steered.astype(int) - free).max() > 1
    fast = LatentDiffusionPipeline.from_pretrained(folder / "model", device="cpu", speed="max", torch_dtype="float32")
    fast.load_controlnet(folder / "control0")
    options = {"control_image": pictures[1], "height": 48, "width": 64, **small}
    assert np.abs(fast(PROMPT, **options).images.astype(int) - ours(PROMPT, **options).images).max() <= 2


def test_union_of_kinds(tmp_path, pictures):
    base = stable_diffusion.pipeline("XL")
    config = {**ControlNetModel.from_unet(base.unet).config, "num_trans_channel": 64, "num_proj_channel": 64}
    known = inspect.signature(ControlNetUnionModel.__init__).parameters
    union = stirred(lambda: ControlNetUnionModel(**{name: config[name] for name in known if name in config}))
    base.save_pretrained(tmp_path / "model")
    union.save_pretrained(tmp_path / "union")
    pipe = StableDiffusionXLControlNetUnionPipeline(**base.components, controlnet=union, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    ours = load(tmp_path / "model")
    ours.load_controlnet(tmp_path / "union")
    options = {**OPTIONS, "height": 48, "width": 64, "controlnet_conditioning_scale": 0.8}
    with pytest.raises(ConfigError, match="this ControlNet knows 6 kinds of pictures: set control_mode"):
        ours(PROMPT, control_image=pictures[0], **options, **OURS)
    with pytest.raises(ConfigError, match="control_mode must be below 6 for this ControlNet"):
        ours(PROMPT, control_image=pictures[0], control_mode=6, **options, **OURS)
    sample = []
    for mode in (0, 3):
        sample.append(
            ours(PROMPT, control_image=pictures[0], control_mode=mode, latents=noise(), **options, **OURS).images
        )
        expected = pipe(
            PROMPT, control_image=[pictures[0]], control_mode=[mode], latents=noise(), output_type="np", **options
        ).images
        assert np.abs(sample[-1] - expected).max() < 1e-4
    assert np.abs(sample[0] - sample[1]).max() > 1e-3


def test_as_diffusers_code_loads_them(place, pictures):
    """`controlnet=` takes a module, several, or paths; the property gives them back."""
    folder, _, controls, family = place
    if family != "1":
        pytest.skip("loading knows nothing of the family")
    options = {"num_inference_steps": 2, "seed": 1, "height": 48, "width": 64, "output_type": "np"}
    load_with = partial(LatentDiffusionPipeline.from_pretrained, folder / "model", device="cpu")
    expected = []
    for given in (controls[0], folder / "control0", [str(folder / "control0")]):
        pipe = load_with(controlnet=given)
        assert isinstance(pipe.controlnet, ControlNetModel)
        expected.append(pipe(PROMPT, control_image=pictures[0], **options).images)
    assert all((each == expected[0]).all() for each in expected)
    pipe = load_with(controlnet=MultiControlNetModel(controls))
    assert [control is own for control, own in zip(pipe.controlnet, controls, strict=True)] == [True, True]
    pipe(PROMPT, control_image=pictures, **options)
    pipe.controlnet = None
    assert pipe.controlnet is None
    pipe(PROMPT, **options)
    pipe.load_controlnet(folder / "control0")
    pipe.to(dtype=torch.bfloat16)
    assert (pipe.controlnet.dtype, pipe.components["unet"].dtype) == (torch.bfloat16, torch.bfloat16)
    pipe.controlnet = controls[0]
    for wrong, message in ((torch.nn.Linear(1, 1), "controlnet must be a path"), ("typo", "typo")):
        with pytest.raises(LatentDiffError, match=message):
            pipe.controlnet = wrong
        assert pipe.controlnet is controls[0], "the one before stays"


@pytest.mark.quick("1-1")
@pytest.mark.parametrize("channels", [pytest.param(3, marks=pytest.mark.slow), 1])
def test_t2i_adapters(place, tmp_path, channels):
    """Features inside the levels, from colours or from grey; several, and beside a ControlNet."""
    folder, base, _, family = place
    levels = list(base.unet.config.block_out_channels)
    sizes = {"downscale_factor": 16, "adapter_type": "full_adapter_xl"} if family == "XL" else {"downscale_factor": 8}
    channels_of = [*levels, levels[-1]] if family == "XL" else levels
    adapter = stirred(lambda: T2IAdapter(channels, channels_of, 1, **sizes))
    adapter.save_pretrained(tmp_path / "adapter")
    grey = Image.fromarray(np.random.default_rng(2).integers(0, 256, (64, 96), np.uint8))
    given = grey if channels == 1 else grey.convert("RGB")
    kind = StableDiffusionXLAdapterPipeline if family == "XL" else StableDiffusionAdapterPipeline
    parts = {
        name: base.components[name] for name in inspect.signature(kind.__init__).parameters if name in base.components
    }
    pipe = kind(**parts, adapter=adapter, **({} if family == "XL" else {"requires_safety_checker": False}))
    pipe.set_progress_bar_config(disable=True)
    ours = load(folder / "model")
    ours.load_controlnet(tmp_path / "adapter")
    for scale, guidance in ((1.0, 4.0), (0.5, 1.0)):
        options = {"height": 64, "width": 96, "num_inference_steps": 5, "guidance_scale": guidance}
        expected = pipe(
            PROMPT, image=given, adapter_conditioning_scale=scale, latents=noise(64, 96), output_type="np", **options
        ).images
        our_options = {"control_image": grey.convert("RGB"), "controlnet_conditioning_scale": scale, **options, **OURS}
        sample = ours(PROMPT, latents=noise(64, 96), **our_options).images
        assert np.abs(sample - expected).max() < 1e-4
    ours.load_controlnet(folder / "control0")
    both = ours(PROMPT, control_image=[grey.convert("RGB")] * 2, latents=noise(64, 96), **options, **OURS).images
    assert np.abs(both - sample).max() > 1e-3
    other = load(folder / "model")
    stirred(lambda: T2IAdapter(3, [32, 32], 1)).save_pretrained(tmp_path / "odd")
    with pytest.raises(ModelError, match="a T2I-Adapter for another model: it has levels"):
        other.load_controlnet(tmp_path / "odd")


@pytest.mark.quick("1")
def test_what_does_not_fit_is_refused(place, pictures, tmp_path):
    folder, _, _, family = place
    ours = load(folder / "model")
    with pytest.raises(ConfigError, match="1 control pictures, and no ControlNet is loaded"):
        ours(PROMPT, control_image=pictures[0])
    with pytest.raises(ConfigError, match="guess_mode requires a ControlNet"):
        ours(PROMPT, guess_mode=True)
    other = {"1": "XL", "2": "1", "XL": "2"}[family]
    control_of(stable_diffusion.pipeline(other).unet).save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="a ControlNet for another model: its block_out_channels"):
        ours.load_controlnet(tmp_path / "other")
    with pytest.raises(UnsafeError, match="CONTROLNET of unknown class UNet2DConditionModel"):
        ours.load_controlnet(folder / "model" / "unet")
    ours.load_controlnet(folder / "control0")
    with pytest.raises(ConfigError, match="0 control pictures, and 1 ControlNets are loaded"):
        ours(PROMPT)
    for settings, message in (
        ({"controlnet_conditioning_scale": [1.0, 2.0]}, "controlnet_conditioning_scale has 2 values"),
        ({"control_guidance_end": 1.5}, "control_guidance_end"),
        ({"control_mode": 1}, "control_mode must be below 1"),
        ({"cache_interval": 2}, "cache_interval does not apply under a control"),
    ):
        with pytest.raises(ConfigError, match=message):
            ours(PROMPT, control_image=pictures[0], **settings)


def original_name(name, config):
    """A ControlNet's weight in the layout of its inventors."""
    match = re.fullmatch(
        r"controlnet_(down_blocks|mid_block|cond_embedding)\.?(conv_in|conv_out|blocks)?\.?(\d*)(\..*)", name
    )
    if match is None:
        return unet_name(name, config)
    kind, part, number, rest = match.groups()
    if kind == "cond_embedding":
        place = {"conv_in": 0, "conv_out": 14}.get(part, 2 * int(number or 0) + 2)
        return f"input_hint_block.{place}{rest}"
    return f"zero_convs.{number}.0{rest}" if kind == "down_blocks" else f"middle_block_out.0{rest}"


@pytest.mark.quick("1-control_model.", "XL-")
@pytest.mark.parametrize("prefix", ["control_model.", ""])
def test_a_single_file(place, pictures, tmp_path, prefix):
    folder, _, controls, _ = place
    state = controls[0].state_dict()
    for number, names in enumerate(
        ({n: prefix + original_name(n, controls[0].config) for n in state}, {n: n for n in state})
    ):
        file = tmp_path / f"control{number}.safetensors"
        save_file({names[name]: tensor.contiguous() for name, tensor in state.items()}, file)
        ours = load(folder / "model")
        ours.load_controlnet(file)
        read = ours.painter.controls[0].model.state_dict()
        assert read.keys() == state.keys()
        assert all(torch.equal(read[name], tensor) for name, tensor in state.items())
    save_file({"a": torch.zeros(1)}, tmp_path / "none.safetensors")
    with pytest.raises(ModelError, match="there is no ControlNet in it"):
        ours.load_controlnet(tmp_path / "none.safetensors")
    other = dict(state)
    other.pop("controlnet_mid_block.weight")
    save_file(other, tmp_path / "short.safetensors")
    with pytest.raises(ModelError, match=r"short.safetensors"):
        ours.load_controlnet(tmp_path / "short.safetensors")


def test_by_the_command_line(place, call, tmp_path):
    """Drawn, recorded, drawn again; refused with one line."""
    folder, _, _, family = place
    if family != "1":
        pytest.skip("the command knows nothing of the family")
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).resize((160, 160)).save(tmp_path / "photo.png")
    words = ("-m", folder / "model", "--steps", 2, "-W", 64, "-H", 64, "-s", 3)
    control = f"{folder / 'control0'}:{tmp_path / 'photo.png'}"
    code, out, _ = call("generate", PROMPT, *words, "--control", f"{control}:0.5", "-o", tmp_path / "a.png")
    assert (code, out) == (0, f"{tmp_path / 'a.png'}\n")
    assert (
        call("generate", PROMPT, *words, "--control", control, "--annotate", "canny", "-o", tmp_path / "b.png")[0] == 0
    )
    assert call("annotate", tmp_path / "photo.png", "-o", tmp_path / "new" / "edges.png")[0] == 0
    code, _, err = call("annotate", tmp_path / "photo.png", "-o", tmp_path / "new" / "edges.png")
    assert (code, "file exists" in err) == (2, True), err
    edges = f"{folder / 'control0'}:{tmp_path / 'new' / 'edges.png'}"
    assert call("generate", PROMPT, *words, "--control", edges, "-o", tmp_path / "c.png")[0] == 0
    pictures = [np.asarray(Image.open(tmp_path / f"{name}.png")) for name in "abc"]
    assert (pictures[1] == pictures[2]).all()
    assert (pictures[0] != pictures[1]).any()
    record = read_metadata(tmp_path / "b.png")["latentdiff"]
    assert record["sources"][0]["kind"] == "controlnet"
    assert (record["hints"][0]["image"], record["hints"][0]["annotator"]) == ("photo.png", "canny")
    shutil.copytree(folder / "control0", tmp_path / "my:control")
    shutil.copy(tmp_path / "photo.png", tmp_path / "a:b.png")
    both = f"{tmp_path / 'my:control'}:{tmp_path / 'a:b.png'}"
    half = ("--set", "controlnet_conditioning_scale=0.5")
    assert call("generate", PROMPT, *words, "--control", both, *half, "-o", tmp_path / "d.png")[0] == 0
    assert (np.asarray(Image.open(tmp_path / "d.png")) == pictures[0]).all()
    for name in "ab":
        again = call("reproduce", tmp_path / f"{name}.png", "-m", folder / "model", "--source", folder / "control0",
                     "-o", tmp_path / "again" / f"{name}.png")  # fmt: skip
        assert again[0] == 0, again[2]
        assert "equal: all" in again[1] + again[2]
    for given, message in (
        ((), "--annotate has no effect without --control"),
        (("--control", "nowhere"), "--control must be MODEL:PICTURE or MODEL:PICTURE:SCALE"),
        (("--control", f"{folder / 'control0'}:nowhere.png"), "nowhere.png"),
        (("--control", f"nowhere:{tmp_path / 'photo.png'}"), "no CONTROLNET (nowhere)"),
        (("--control", f"{control}:99"), "controlnet_conditioning_scale"),
        (("--control", f"{control}:0.5", "--set", "controlnet_conditioning_scale=1"), "is given twice"),
        (("--control", control, "--annotate", "depth"), "unknown annotator 'depth'; one of canny"),
    ):
        annotate = () if "--annotate" in given else ("--annotate", "canny")
        code, out, err = call("generate", PROMPT, *words, *given, *annotate, "-o", tmp_path / "no.png")
        assert (code in (2, 3, 4), out, err.count("\n")) == (True, "", 1), err
        assert message in err


def test_annotators():
    """Closed forms: a white square on black."""
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[16:48, 32:64] = (255, 255, 255)
    edges = ANNOTATORS["canny"](pixels)
    assert set(np.unique(edges)) == {0, 255}
    inside = np.zeros((64, 96), bool)
    inside[14:50, 30:66] = True
    inside[18:46, 34:62] = False
    assert (edges[..., 0] > 0).sum() >= 4 * 30
    assert not edges[~inside].any(), "within two pixels of the square's edge"
    red = np.zeros((64, 64, 3), np.uint8)
    red[..., 0] = 200
    assert (ANNOTATORS["grey"](red) == 60).all(), "0.299 times 200"
    for kind in ("blur", "tile", "palette", "segments"):
        assert (ANNOTATORS[kind](red) == red).all(), "one colour stays"
    halves = np.zeros((32, 32, 3), np.uint8)
    halves[:, 8:] = 100  # three quarters of the left squares
    assert set(np.unique(ANNOTATORS["palette"](halves))) == {50, 100}
    checks = np.zeros((64, 64, 3), np.uint8)
    checks[(np.indices((64, 64)).sum(0) % 2).astype(bool)] = 200
    assert np.abs(ANNOTATORS["tile"](checks).astype(int) - 100).max() <= 2, "what is finer than a tile is gone"
    step = np.zeros((400, 400, 3), np.uint8)
    step[:, 200:] = 255
    slope = np.diff(ANNOTATORS["blur"](step)[200, :, 0].astype(float)) / 255
    places = np.arange(399) - 199
    assert (slope * places).sum() == pytest.approx(0, abs=0.5)
    assert (slope * places**2).sum() ** 0.5 == pytest.approx(400 / 50, rel=0.05), "the Gaussian's radius"
    two = ANNOTATORS["segments"](np.concatenate([red, pixels[:64, :64]], 1))
    assert len(np.unique(two.reshape(-1, 3), axis=0)) == 3
    for annotate in ANNOTATORS.values():
        assert annotate(pixels[:17, :23]).shape == (17, 23, 3)
        assert (annotate(pixels) == annotate(pixels)).all()
    with pytest.raises(ConfigError, match="unknown annotator"):
        annotator("depth")


def test_taught_by_pictures_of_its_own(call, tiny_model, tmp_path):
    """A folder of the same names, cropped alike; what is missing or of another size is refused."""
    rng, lines = np.random.default_rng(0), []
    for name in ("photos", "maps"):
        (tmp_path / name).mkdir()
    for number in range(6):
        pixels = rng.integers(0, 256, (70 + number, 90, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
        Image.fromarray(255 - pixels).save(tmp_path / "maps" / f"{number}.webp", lossless=True)
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"picture {number}"}))
    (tmp_path / "photos" / "metadata.jsonl").write_text("\n".join(lines))
    quick = ("--steps", 2, "--train-batch-size", 2, "--lr", 1e-2, "--set", "previews.count=2")
    more = (
        "--set",
        "previews.num_inference_steps=1",
        "--set",
        "data.pictures.crop=random",
        "--set",
        "finetune.cache=false",
    )
    words = ("finetune", tiny_model, tmp_path / "photos", "--method", "controlnet", *quick, *more)
    code, _, err = call(*words, "-o", tmp_path / "run", "--control-pictures", tmp_path / "maps")
    assert code == 0, err
    config, _ = load_settings_and_model(tmp_path / "run" / "finetune.toml", ())
    data = open_data(config)
    (seen,) = companions(config, [data.training], config.control.source)
    for row in range(len(data.training)):
        assert np.abs(seen.image(row, 3).astype(int) - (255 - data.training.image(row, 3))).max() <= 1, "the same place"
    assert "--annotate" not in (tmp_path / "run" / "README.md").read_text()
    changed = tmp_path / "maps" / "0.webp"
    picture = Image.open(changed).convert("RGB")
    picture.resize((33, 21)).save(changed)
    code, _, err = call(*words, "-o", tmp_path / "other", "--control-pictures", tmp_path / "maps")
    assert (code, "have different sizes" in err) == (3, True), err
    changed.unlink()
    code, _, err = call(*words, "-o", tmp_path / "other", "--control-pictures", tmp_path / "maps")
    assert (code, "0.png has no picture of this name" in err) == (3, True), err
    picture.rotate(180).save(changed)
    code, _, err = call(*words, "-o", tmp_path / "run", "--control-pictures", tmp_path / "maps", "--steps", 3)
    assert code != 0, "other control pictures are another run"
    for given, message in (
        (("--method", "lora", "--annotator", "canny"), 'control has no effect without method = "controlnet"'),
        (("--method", "controlnet", "--annotator", "depth"), "annotator"),
        (("--method", "controlnet", "--class-prompt", "a dog"), "controlnet trains only a network beside the model"),
    ):
        code, _, err = call("finetune", tiny_model, tmp_path / "photos", "-o", tmp_path / "no", *given)
        assert (code, message in err) == (2, True), err


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"guess_mode": True}, {}, {"control_guidance_end": 0.5, "hires_scale": 1.5}])
def test_by_openvino(exported_place, pictures, settings):
    """The ControlNet's and the U-Net's graphs draw what torch draws."""
    folder, _ = exported_place
    options = {"prompt": PROMPT, "seed": 3, "num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "uint8"}
    options |= {"control_image": pictures[1], "height": 48, "width": 64, **settings}
    sample = []
    for runtime in ("openvino", "torch"):
        load_it = partial(LatentDiffusionPipeline.from_pretrained, folder / "model", torch_dtype="float32")
        pipe = load_it(runtime=runtime)
        pipe.load_controlnet(folder / "control0")
        assert pipe.runtime == runtime
        sample.append(pipe(**options).images.astype(int))
    assert np.abs(sample[0] - sample[1]).max() <= 1


def test_what_only_torch_has_takes_the_control_along(exported_place, pictures):
    """A change to torch reloads compiled ControlNets; one without graphs changes to torch."""
    folder, _ = exported_place
    pipe = LatentDiffusionPipeline.from_pretrained(folder / "model", torch_dtype="float32")
    pipe.load_controlnet(folder / "control0")
    options = {"seed": 3, "num_inference_steps": 2, "height": 48, "width": 64, "output_type": "uint8"}
    first = pipe(PROMPT, control_image=pictures[1], **options).images
    assert pipe.runtime == "openvino"
    with pytest.warns(UserWarning, match="a ControlNet without graphs requires torch"):
        pipe.load_controlnet(folder / "control1")
    assert pipe.runtime == "torch"
    options |= {"control_image": [pictures[1]] * 2, "controlnet_conditioning_scale": [1.0, 0.0]}
    assert np.abs(pipe(PROMPT, **options).images.astype(int) - first).max() <= 1


@pytest.mark.parametrize("is_controlled", [False, True])
def test_an_image_prompt_by_openvino(exported_place, pictures, is_controlled):
    """The U-Net's graph reads the adapter's keys and values, alone and beside a ControlNet's residuals."""
    folder, _ = exported_place
    options = {"prompt": PROMPT, "seed": 3, "num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "uint8"}
    options |= {"height": 48, "width": 64, "ip_adapter_image": [pictures], "ip_adapter_scale": 0.8}
    options |= {"control_image": pictures[1]} if is_controlled else {}
    sample = []
    for runtime in ("openvino", "torch"):
        pipe = LatentDiffusionPipeline.from_pretrained(folder / "model", torch_dtype="float32", runtime=runtime)
        if is_controlled:
            pipe.load_controlnet(folder / "control0")
        pipe.load_ip_adapter(folder / "plus.safetensors")
        sample.append(pipe(**options).images.astype(int))
        assert pipe.runtime == runtime
        sample.append(pipe(**options | {"ip_adapter_scale": 0.0}).images.astype(int))
    compiled, compiled_alone, expected, expected_alone = sample
    assert np.abs(compiled - expected).max() <= 1
    assert np.abs(compiled_alone - expected_alone).max() <= 1
    assert np.abs(compiled - compiled_alone).max() > 1, "it steers"


def test_what_only_torch_has_takes_the_image_prompt_along(exported_place, pictures):
    """Masks, a second IP-Adapter and DeepCache change to torch, which draws the same with the adapter."""
    folder, _ = exported_place
    options = {"seed": 3, "num_inference_steps": 2, "height": 48, "width": 64, "output_type": "uint8"}
    white = Image.fromarray(np.full((48, 64), 255, np.uint8))

    def opened(**settings):
        pipe = LatentDiffusionPipeline.from_pretrained(folder / "model", torch_dtype="float32", **settings)
        pipe.load_ip_adapter(folder / "plus.safetensors")
        return pipe

    pipe = opened()
    first = pipe(PROMPT, ip_adapter_image=pictures[0], **options).images
    assert pipe.runtime == "openvino"
    masked = {"ip_adapter_image": pictures[0], "cross_attention_kwargs": {"ip_adapter_masks": [[white]]}}
    with pytest.warns(UserWarning, match="a mask of an image prompt requires torch"):
        assert np.abs(pipe(PROMPT, **masked, **options).images.astype(int) - first).max() <= 1
    pipe = opened()
    with pytest.warns(UserWarning, match="a second IP-Adapter requires torch"):
        pipe.load_ip_adapter(folder / "plus.safetensors")
    both = {"ip_adapter_image": [pictures[0], pictures[0]], "ip_adapter_scale": [1.0, 0.0]}
    assert np.abs(pipe(PROMPT, **both, **options).images.astype(int) - first).max() <= 1
    with pytest.raises(ConfigError, match="cache_interval with an IP-Adapter requires the torch runtime"):
        opened(runtime="openvino")(PROMPT, ip_adapter_image=pictures[0], cache_interval=2, **options)
    save_file(ip_adapters.state(stable_diffusion.pipeline("XL").unet, "plus"), folder / "xl.safetensors")
    pipe = LatentDiffusionPipeline.from_pretrained(folder / "model", runtime="openvino")
    with pytest.raises(ModelError, match="layer 0 has"):
        pipe.load_ip_adapter(folder / "xl.safetensors", image_encoder_folder=None)


@pytest.mark.slow
def test_exports_of_controls_are_checked(exported_place, tmp_path, call):
    folder, _ = exported_place
    other = tmp_path / "other"
    stable_diffusion.pipeline("2").save_pretrained(other)
    export(stored_model(other), other)
    pipe = LatentDiffusionPipeline.from_pretrained(other, runtime="openvino")
    with pytest.raises(ModelError, match="a ControlNet for another model: it adds to"):
        pipe.load_controlnet(folder / "control0")
    T2IAdapter(3, [32, 64], 1).save_pretrained(tmp_path / "adapter")
    code, _, err = call("convert", tmp_path / "adapter", "--to", "openvino")
    assert (code, "a T2I-Adapter draws with torch" in err, err.count("\n")) == (2, True, 1), err
    damaged = shutil.copytree(folder / "control0", tmp_path / "damaged")
    record = json.loads((damaged / "openvino" / "export.json").read_text())
    del record["control"]["skips"]
    (damaged / "openvino" / "export.json").write_text(json.dumps(record))
    plain = LatentDiffusionPipeline.from_pretrained(folder / "model", runtime="openvino")
    with pytest.raises(ModelError, match="an export whose facts were changed"):
        plain.load_controlnet(damaged)


@pytest.fixture(scope="module")
def exported_place(compiled_model, tmp_path_factory):
    """A model and a ControlNet with graphs, and without them a ControlNet and an IP-Adapter."""
    folder, unet = tmp_path_factory.mktemp("exported"), stored_model(compiled_model).parts["unet"]
    (folder / "model").symlink_to(compiled_model)
    for index in range(2):
        stirred(partial(ControlNet.create, unet, 2), 7 + index).save(folder / f"control{index}")
    ip_adapters.image_encoder().save_pretrained(folder / "image_encoder")
    view = ip_adapters.state(unet, "plus")  # strong enough to change the pictures of a model that has learnt little
    view |= {name: 300 * weight for name, weight in view.items() if name.endswith("to_v_ip.weight")}
    save_file(view, folder / "plus.safetensors")
    differences = export_control(stored_control(folder / "control0"), folder / "control0")
    assert max(differences.values()) < 1e-5
    return folder, differences
