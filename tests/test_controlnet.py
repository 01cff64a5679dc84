"""ControlNets: the pictures are those of diffusers' pipelines, with the same weights and noise."""

import inspect

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    MultiControlNetModel,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLControlNetUnionPipeline,
)
from PIL import Image

from latentdiff import LatentDiffusionPipeline
from latentdiff.core.errors import ConfigError, ModelError, UnsafeError
from latentdiff.diffusion.process import diffuse

from . import stable_diffusion
from .stable_diffusion import load

PROMPT, NEGATIVE = "a castle on the hill", "blurry"
OURS = {"sampler": "ddim", "spacing": "trailing", "output_type": "np"}
ASKED = {"num_inference_steps": 5, "guidance_scale": 4.0}


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


@pytest.fixture(scope="module", params=["1", "2", "XL"])
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


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_as_diffusers_draws(place, pictures, settings):
    folder, base, controls, family = place
    asked = {"negative_prompt": NEGATIVE, **ASKED, **settings, "height": 48, "width": 64, "latents": noise()}
    expected = theirs(base, family, controls[0])(PROMPT, image=pictures[1], output_type="np", **asked).images
    ours = load(folder / "model")
    plain = ours(PROMPT, **{k: v for k, v in asked.items() if k not in settings or k == "guidance_scale"}, **OURS)
    ours.load_controlnet(folder / "control0")
    drawn = ours(PROMPT, control_image=pictures[1], **asked, **OURS).images
    assert np.abs(drawn - expected).max() < 1e-4
    assert np.abs(drawn - plain.images).max() > 1e-3, "it steers"
    ours.unload_controlnets()
    assert (
        ours(PROMPT, **{**ASKED, "height": 48, "width": 64, "latents": noise()}, **OURS).images
    ).shape == drawn.shape


def test_several_at_once(place, pictures):
    folder, base, controls, family = place
    each = {
        "controlnet_conditioning_scale": [0.7, 1.2],
        "control_guidance_start": [0.0, 0.4],
        "control_guidance_end": [0.8, 1.0],
    }
    asked = {"negative_prompt": NEGATIVE, **ASKED, **each, "height": 48, "width": 64, "latents": noise()}
    pipe = theirs(base, family, MultiControlNetModel(controls))
    expected = pipe(PROMPT, image=pictures, output_type="np", **asked).images
    ours = load(folder / "model")
    for index in range(2):
        ours.load_controlnet(folder / f"control{index}")
    drawn = ours(PROMPT, control_image=pictures, **asked, **OURS).images
    assert np.abs(drawn - expected).max() < 1e-4


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
    asked = {"image": pictures[0], "num_inference_steps": 10, "guidance_scale": 3.0, "strength": 0.65, **shares}
    expected = made(PROMPT, control_image=pictures[1], height=48, width=64, output_type="np", **asked).images
    drawn = ours(PROMPT, control_image=pictures[1], latents=noise(), **asked, **OURS).images
    assert np.abs(drawn - expected).max() < 1e-4


@pytest.mark.slow
def test_in_every_other_way(place, pictures):
    """Beside an input picture with a mask, a second pass, other guidance, every sampler and speed."""
    folder, *_ = place
    ours = load(folder / "model")
    ours.load_controlnet(folder / "control0")
    mask = np.zeros((48, 64), np.uint8)
    mask[10:30, 20:50] = 255
    small = {"num_inference_steps": 3, "seed": 1, "output_type": "uint8"}
    for asked in (
        {"image": pictures[0], "mask_image": mask},
        {"hires_scale": 2.0, "height": 48, "width": 64},
        {"pag_scale": 2.0, "height": 48, "width": 64},
        {"sampler": "heun", "height": 48, "width": 64, "guidance_rescale": 0.5},
        {"num_images_per_prompt": 3, "batch_size": 2, "height": 48, "width": 64},
    ):
        steered, free = (
            ours(PROMPT, control_image=pictures[1], controlnet_conditioning_scale=scale, **asked, **small).images
            for scale in (1.0, 0.0)
        )
        alone = load(folder / "model")(PROMPT, **asked, **small).images
        assert np.abs(free.astype(int) - alone).max() <= 1, "a scale of zero is no control"
        assert np.abs(steered.astype(int) - free).max() > 1
    fast = LatentDiffusionPipeline.from_pretrained(folder / "model", device="cpu", speed="max", torch_dtype="float32")
    fast.load_controlnet(folder / "control0")
    asked = {"control_image": pictures[1], "height": 48, "width": 64, **small}
    assert np.abs(fast(PROMPT, **asked).images.astype(int) - ours(PROMPT, **asked).images).max() <= 2


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
    asked = {**ASKED, "height": 48, "width": 64, "controlnet_conditioning_scale": 0.8}
    with pytest.raises(ConfigError, match="this ControlNet knows 6 kinds of pictures: set control_mode"):
        ours(PROMPT, control_image=pictures[0], **asked, **OURS)
    with pytest.raises(ConfigError, match="control_mode 6 is none of the 6 kinds"):
        ours(PROMPT, control_image=pictures[0], control_mode=6, **asked, **OURS)
    drawn = []
    for mode in (0, 3):
        drawn.append(
            ours(PROMPT, control_image=pictures[0], control_mode=mode, latents=noise(), **asked, **OURS).images
        )
        expected = pipe(
            PROMPT, control_image=[pictures[0]], control_mode=[mode], latents=noise(), output_type="np", **asked
        ).images
        assert np.abs(drawn[-1] - expected).max() < 1e-4
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-3


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
        ({"control_mode": 1}, "control_mode 1 is none of the 1 kinds"),
        ({"cache_interval": 2}, "cache_interval has no meaning under a control"),
    ):
        with pytest.raises(ConfigError, match=message):
            ours(PROMPT, control_image=pictures[0], **settings)
