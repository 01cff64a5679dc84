"""Code written for diffusers' pipelines: the same result, or an error that names what to use here."""

import warnings
from dataclasses import replace
from importlib.util import find_spec

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from latentdiff import LatentDiffusionPipeline
from latentdiff.core.errors import ConfigError, ModelError
from latentdiff.diffusion.path import Straight
from latentdiff.diffusion.samplers import SAMPLERS
from latentdiff.drawing.extras import adaptable_networks
from latentdiff.drawing.request import request
from latentdiff.families.loading import included_model
from latentdiff.families.sampling import sampling_of, scheduler_of

from .stable_diffusion import load

SPACINGS = ("leading", "linspace", "trailing")
PROMPT, NEGATIVE = "a castle on a hill", "fog"
OPTIONS = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 64, "width": 64, "output_type": "latent"}


@pytest.fixture(scope="module")
def ours(folders):
    return LatentDiffusionPipeline.from_pretrained(folders["1"], device="cpu")


@pytest.fixture(scope="module")
def theirs(folders):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folders["1"], safety_checker=None)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def sampled(folders):
    """A pipeline whose sampler the tests change."""
    return load(folders["1"])


def noise(count=1):
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def close(a, b):
    assert float((a - b).abs().max() / b.abs().max()) < 1e-5


def scheduler(name, pipe, **changes):
    config = dict(pipe.scheduler.config) | {"timestep_spacing": "trailing"} | changes
    return getattr(diffusers, name).from_config(config)


def test_names_of_other_programs_for_grids():
    """A1111's "Karras" and "SGM Uniform"; one that nobody knows is named once."""
    for name, ours in (("Karras", "karras"), ("SGM Uniform", "sgm_uniform"), ("Align Your Steps", "align_your_steps")):
        assert request(prompt="a", spacing=name).spacing == ours
    with pytest.raises(ConfigError) as caught:
        request(prompt="a", spacing="Nobody's")
    assert str(caught.value).count("Nobody's") == 1


@pytest.mark.parametrize(("width", "height"), [(72, 40), (88, 56), (8, 8), (64, 136)])
def test_any_multiple_of_the_vaes_factor(ours, theirs, width, height):
    """Sides that the U-Net's levels do not halve evenly: each level is enlarged to the size of its skip connections."""
    x = torch.randn(1, 4, height // 8, width // 8, generator=torch.Generator().manual_seed(0))
    extra = OPTIONS | {"width": width, "height": height, "output_type": "pt", "latents": x}
    picture = ours(PROMPT, sampler="ddim", spacing="leading", **extra).images
    assert picture.shape == (1, 3, height, width)
    close(picture, theirs(PROMPT, **extra).images)


# schedulers


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "PNDMScheduler"])
def test_a_scheduler_is_taken(name, folders, theirs):
    """`pipe.scheduler = X.from_config(pipe.scheduler.config)`, word for word, in both pipelines."""
    pipe = load(folders["1"])
    for each in (pipe, theirs):
        each.scheduler = scheduler(name, each, skip_prk_steps=True)
    assert type(pipe.scheduler) is type(theirs.scheduler)
    x = noise()
    start = x * pipe.model.path.level(999).sigma if name == "EulerDiscreteScheduler" else x
    close(pipe(PROMPT, latents=start, **OPTIONS).images, theirs(PROMPT, latents=x, **OPTIONS).images)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
def test_a_scheduler_comes_back_as_it_was_set(name, spacing, folders):
    """So that `X.from_config(pipe.scheduler.config)` keeps the spacing."""
    pipe = load(folders["1"])
    pipe.scheduler = scheduler(name, pipe, timestep_spacing=spacing)
    before = dict(pipe.card.defaults)
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    assert pipe.card.defaults == before


@pytest.mark.filterwarnings("ignore:.* of this scheduler is not")  # exponential sigmas of multistep solvers differ
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # NumPy's, of KDPM2
@pytest.mark.parametrize("sampler", [*(name for name, row in SAMPLERS.items() if row.schedulers), "dpmpp_2m_sde"])
def test_every_sampling_comes_back(sampler, sampled):
    """The scheduler of a sampler and a grid asks for that sampler and that grid."""
    pipe = sampled
    grids = {"karras", "exponential", "trailing"}
    kind, _ = scheduler_of(sampler, "trailing")
    grids |= {sampling_of({"_class_name": kind, "timestep_spacing": s}).settings["spacing"] for s in SPACINGS}
    for spacing in grids - ({"trailing"} if sampler in ("lcm", "tcd") else set()):
        pipe._recommend(sampler=sampler, spacing=spacing)
        if sampler == "dpmpp_sde" and find_spec("torchsde") is None:
            with pytest.raises(ConfigError, match="DPMSolverSDEScheduler requires the torchsde library"):
                _ = pipe.scheduler
            continue
        pipe.scheduler = pipe.scheduler
        assert (pipe.card.defaults["sampler"], pipe.card.defaults["spacing"]) == (sampler, spacing)
        assert pipe.scheduler.config.get("skip_prk_steps", True), "the steps of PNDM that plms has not"


def test_samplings_that_no_scheduler_has(folders):
    """One line instead of the library's own error."""
    pipe = load(folders["1"])
    pipe._recommend(sampler="heun", spacing="beta")
    with pytest.raises(ConfigError, match="diffusers cannot make the scheduler: beta is not supported"):
        _ = pipe.scheduler


def test_a_scheduler_says_what_is_predicted(folders):
    """As in diffusers: `from_config(pipe.scheduler.config, prediction_type=...)` mends a model that is read wrongly."""
    pipe = load(folders["1"])
    extra = {**OPTIONS, "latents": noise()}
    as_epsilon = pipe(PROMPT, **extra).images
    as_v = pipe(PROMPT, prediction="v_prediction", **extra).images
    assert not torch.equal(as_v, as_epsilon)
    pipe.scheduler = scheduler("DDIMScheduler", pipe, prediction_type="v_prediction")
    assert torch.equal(pipe(PROMPT, **extra).images, as_v)
    assert pipe.scheduler.config.prediction_type == "v_prediction"


def test_schedulers_of_other_models(ours):
    for changes, message in (
        ({"beta_end": 0.02}, "another noise schedule"),
        ({"rescale_betas_zero_snr": True}, "another noise schedule"),
    ):
        with pytest.raises(ConfigError, match=message):
            ours.scheduler = scheduler("DDIMScheduler", ours, **changes)
    for other in (None, "ddim", object()):
        with pytest.raises(ConfigError, match="must be a scheduler of diffusers"):
            ours.scheduler = other


def test_what_a_scheduler_has_and_we_have_not(folders):
    pipe = load(folders["1"])
    with pytest.warns(UserWarning, match="solver_order=3 of this scheduler is not supported"):
        pipe.scheduler = scheduler("DPMSolverMultistepScheduler", pipe, solver_order=3)


def test_a_scheduler_of_a_compiled_model(compiled_model):
    """Sampler and spacing change, the runtime does not."""
    pipe = LatentDiffusionPipeline.from_pretrained(compiled_model, device="cpu")
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace")
    record = pipe("a red circle", seed=1, num_inference_steps=2).metadata[0]
    assert (record.request["sampler"], record.request["spacing"]) == ("euler", "linspace_exact")
    assert pipe.runtime == record.runtime == "openvino"
    with pytest.warns(UserWarning, match="components requires torch"):
        assert pipe.components
    assert pipe("a red circle", seed=1, num_inference_steps=2).metadata[0].request["sampler"] == "euler"


def test_nothing_else_can_be_set(ours):
    for name in ("unet", "safety_checker", "anything"):
        with pytest.raises(AttributeError, match=f"no attribute {name!r}|no setter"):
            setattr(ours, name, None)
    with pytest.raises(AttributeError, match=r"use components\['unet'\]"):
        _ = ours.unet
    with pytest.raises(AttributeError, match="has no anything"):
        _ = ours.anything


# the VAE


def test_another_vae(folders, theirs):
    other = diffusers.AutoencoderKL.from_pretrained(folders["1"], subfolder="vae")
    with torch.no_grad():
        other.decoder.conv_out.bias.add_(0.3)
    pipe = load(folders["1"])
    before = pipe(PROMPT, latents=noise(), **OPTIONS | {"output_type": "pt"}).images
    pipe.vae = other
    after = pipe(PROMPT, latents=noise(), **OPTIONS | {"output_type": "pt"}).images
    assert not torch.equal(before, after)
    latents = pipe(PROMPT, latents=noise(), **OPTIONS).images
    expected = (other.decode(latents / other.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(after, expected.detach(), rtol=1e-4, atol=1e-5)
    assert pipe.vae is other
    assert [source.kind for source in pipe.painter.sources.values()] == ["vae"]
    with pytest.raises(ConfigError, match="vae must be an AutoencoderKL"):
        pipe.vae = torch.nn.Linear(1, 1)
    with pytest.raises(ModelError, match="does not fit"):
        pipe.vae = diffusers.AutoencoderKL(latent_channels=3)
    assert pipe.vae is other


# arguments of calls


def test_as_a_tuple(ours, folders):
    images, nothing = ours(PROMPT, latents=noise(), return_dict=False, **OPTIONS)
    assert torch.equal(images, ours(PROMPT, latents=noise(), **OPTIONS).images)
    assert nothing is None
    assert len(load(folders["XL"])(PROMPT, return_dict=False, **OPTIONS)) == 1


def test_positional_sizes(ours):
    out = ours(PROMPT, 64, 80, 3, seed=1, output_type="pt")
    assert out.images.shape == (1, 3, 64, 80)
    assert out.metadata[0].steps == (3,)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_timesteps_and_sigmas(name, folders, theirs):
    pipe = load(folders["1"])
    for each in (pipe, theirs):
        each.scheduler = scheduler(name, each)
    x = noise()
    extra = {key: value for key, value in OPTIONS.items() if key != "num_inference_steps"}
    if name == "DDIMScheduler":
        at_times = pipe(PROMPT, latents=x, timesteps=[900, 500, 100], **extra)
        assert at_times.metadata[0].steps == (3,)
        assert at_times.metadata[0].request["timesteps"] == (900.0, 500.0, 100.0)
        products = theirs.scheduler.alphas_cumprod[[900, 500, 100]]
        ratios = ((1 - products) / products).sqrt().tolist()
        same = pipe(PROMPT, latents=x, sigmas=[*ratios, 0.0], **extra).images
        torch.testing.assert_close(at_times.images, same, rtol=1e-3, atol=1e-4)
        others = pipe(PROMPT, latents=x, timesteps=[900, 600, 100], **extra).images
        assert (at_times.images - others).abs().max() > 1e-3
        return
    start = x * pipe.model.path.level_of(10.0).sigma
    expected = theirs(PROMPT, latents=x, sigmas=[10.0, 3.0, 1.0, 0.0], **extra).images
    # theirs begins at the largest sigma of the table whatever the list says
    scale = float(theirs.scheduler.init_noise_sigma) / 10
    close(pipe(PROMPT, latents=start * scale, sigmas=[10.0, 3.0, 1.0, 0.0], **extra).images, expected)
    picture = pipe(PROMPT, latents=start * scale, sigmas=np.array([10.0, 3.0, 1.0]), **extra).images
    close(picture, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timesteps": [1, 2]}, "must fall"),
        ({"timesteps": [5000, 2]}, "timesteps: t must be from 0 to 999"),
        ({"timesteps": []}, "timesteps"),
        ({"timesteps": [9, 2], "sigmas": [2.0, 1.0]}, "exclude each other"),
        ({"timesteps": [9, 2], "num_inference_steps": 5}, "2 timesteps or sigmas for 5 num_inference_steps"),
        ({"sigmas": [float("nan"), 1]}, "sigmas"),
        ({"callback": print}, "callback is not taken: use callback_on_step_end, or stream"),
        ({"ip_adapter_image": 1}, "1 image prompts, and no IP-Adapter is loaded"),
        ({"denoising_end": 0.8}, "denoising_end is not taken: use load_refiner and refiner_switch"),
        ({"crops_coords_top_left": (0, 0)}, "use crop"),
        ({"cross_attention_kwargs": {"gligen": 1}}, "can be a scale of the adapters and ip_adapter_masks only"),
        ({"cross_attention_kwargs": {"scale": "x"}}, "scale must be a number up to 10"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, r'can be \["latents"\] only'),
        ({"timesteps": 5}, "timesteps must be a list"),
        ({"timesteps": (t for t in (5, 4))}, "timesteps must be a list"),
        ({"timesteps": np.array([[5, 4]])}, "timesteps"),
        ({"sigmas": {900: 1}}, "sigmas must be a list"),
        ({"sigmas": [1.0, 0.0, 0.0]}, "must fall"),
        ({"callback_on_step_end": 5}, "must be a function"),
        ({"callback_on_step_end_tensor_inputs": 5}, "can be"),
        ({"cross_attention_kwargs": {"scale": 10**400}}, "scale must be a number up to 10"),
        ({"image": np.zeros((0, 0, 3), "f4")}, "image must be a PIL image"),
        ({"image": torch.zeros(3, 64, 64, device="meta")}, "image"),
        ({"prompt_2": "else"}, "both text encoders read the same prompt"),
        ({"negative_prompt": ["a", "b"]}, "a text for each of 1 prompts"),
        ({"negative_prompt": 5}, "negative_prompt must be text"),
        ({"num_images_per_prompt": "x", "generator": torch.Generator()}, "num_images"),
        ({"batch_size": "4", "generator": torch.Generator()}, "batch_size"),
        ({"batch_size": None, "generator": torch.Generator()}, "batch_size"),
    ],
)
def test_refused(settings, message, ours):
    with pytest.raises(ConfigError, match=message):
        ours(PROMPT, **{"height": 64, "width": 64} | settings)


def test_a_prompt_for_both_encoders(folders):
    pipe = load(folders["XL"])
    x = noise()
    twice = pipe(PROMPT, negative_prompt=NEGATIVE, prompt_2=PROMPT, negative_prompt_2=NEGATIVE, latents=x, **OPTIONS)
    assert torch.equal(twice.images, pipe(PROMPT, negative_prompt=NEGATIVE, latents=x, **OPTIONS).images)


def test_a_negative_prompt_for_each(ours):
    prompts, x = [PROMPT, "a boat"], noise(2)
    out = ours(prompts, negative_prompt=["fog", "rain"], latents=x, **OPTIONS)
    for row, (prompt, negative) in enumerate(zip(prompts, ["fog", "rain"], strict=True)):
        alone = ours(prompt, negative_prompt=negative, latents=x[row : row + 1], **OPTIONS).images
        torch.testing.assert_close(out.images[row : row + 1], alone, rtol=1e-4, atol=1e-4)
    assert [record.request["negative_prompt"] for record in out.metadata] == ["fog", "rain"]


def test_numpy_s_numbers(ours):
    numpy = {"num_inference_steps": np.int64(2), "height": np.int32(64), "width": np.int64(64), "seed": np.uint32(3)}
    plain = {name: int(value) for name, value in numpy.items()}
    more = {"guidance_scale": np.float32(3.0), "num_images_per_prompt": np.int64(2), "output_type": "latent"}
    assert torch.equal(
        ours(PROMPT, **numpy, **more).images,
        ours(PROMPT, **plain, guidance_scale=3.0, num_images_per_prompt=2, output_type="latent").images,
    )


@pytest.mark.parametrize("form", ["pt", "pt batch", "np", "np batch", "list"])
def test_pictures_of_other_kinds(form, ours):
    """Of floats in [0, 1] the same picture as of uint8."""
    photo = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    mask = np.zeros((64, 64), np.uint8)
    mask[:32] = 255
    floats = photo.astype(np.float32) / 255
    given, marked = {
        "pt": (torch.from_numpy(floats).permute(2, 0, 1), torch.from_numpy(mask / 255.0)),
        "pt batch": (torch.from_numpy(floats).permute(2, 0, 1)[None], torch.from_numpy(mask / 255.0)[None, None]),
        "np": (floats, mask / 255.0),
        "np batch": (floats[None], (mask / 255.0)[None]),
        "list": ([Image.fromarray(photo)], [Image.fromarray(mask)]),
    }[form]
    extra = {"num_inference_steps": 2, "seed": 1, "output_type": "uint8"}
    expected = ours(PROMPT, image=photo, mask_image=mask, **extra).images
    np.testing.assert_array_equal(ours(PROMPT, image=given, mask_image=marked, **extra).images, expected)
    with pytest.raises(ConfigError, match=r"image of floats must be in \[0, 1\]"):
        ours(PROMPT, image=2 * floats - 1, **extra)
    with pytest.raises(ConfigError, match="image must be one picture"):
        ours(PROMPT, image=[Image.fromarray(photo)] * 2, **extra)


def test_one_generator_for_more_pictures_than_a_batch(ours):
    """Drawn as one batch, as in diffusers, also by a sampler that adds noise."""
    extra = {"num_images_per_prompt": 10, "sampler": "euler_ancestral", **OPTIONS}
    alone = ours(PROMPT, generator=torch.Generator().manual_seed(1), **extra).images
    whole = ours(PROMPT, generator=torch.Generator().manual_seed(1), batch_size=10, **extra).images
    assert torch.equal(alone, whole)


# callbacks


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_callbacks(name, folders, theirs):
    """The same indices, times and latents as in diffusers, and the same effect of changing them."""
    pipe, seen = load(folders["1"]), {}

    def changing(each, index, t, given):
        seen.setdefault(each, []).append((index, float(t), given["latents"].clone()))
        return {"latents": 0.9 * given["latents"] + 0.01} if index == 1 else given

    x, results = noise(), []
    for each in (pipe, theirs):
        each.scheduler = scheduler(name, each)
        start = x * pipe.model.path.level(999).sigma if each is pipe and name == "EulerDiscreteScheduler" else x
        results.append(each(PROMPT, latents=start, callback_on_step_end=changing, **OPTIONS).images)
    close(*results)
    for (i, t, latents), (j, s, others) in zip(seen[pipe], seen[theirs], strict=True):
        assert (i, t) == (j, s)
        close(latents, others)


def test_callbacks_on_a_straight_path(ours):
    """Flow matching of diffusers has no x / alpha: the latents are those of the walk."""
    model = replace(ours.model, path=Straight(), prediction="flow")
    pipe, seen = LatentDiffusionPipeline(model), []
    extra = {"sampler": "euler", "spacing": "trailing", "seed": 1, "num_inference_steps": 3, "height": 64, "width": 64}
    steps = [step.x for step in pipe.stream(PROMPT, **extra)]
    pipe(PROMPT, callback_on_step_end=lambda *a: seen.append(a[3]["latents"].clone()), **extra)
    for latents, x in zip(seen, steps, strict=True):
        assert torch.equal(latents, x)


def test_a_callback_in_place_and_at_the_end(ours):
    """What a callback does to the latents in place counts, and of the last step too."""
    final = ours(PROMPT, latents=noise(), **OPTIONS).images

    def halved(_, index, t, given):
        if index == 3:
            given["latents"] *= 0.5
        return given

    assert torch.equal(ours(PROMPT, latents=noise(), callback_on_step_end=halved, **OPTIONS).images, 0.5 * final)
    same = ours(PROMPT, latents=noise(), callback_on_step_end=lambda *a: None, **OPTIONS).images
    assert torch.equal(same, final)


@pytest.mark.parametrize(
    "latents", [None, "x", [1], torch.zeros(2, 4, 8, 8), torch.zeros(1), torch.zeros(1, 4, 4, 4), 1j * noise()]
)
def test_callbacks_that_return_something_else(latents, ours):
    with pytest.raises(ConfigError, match="must return latents like those it gets"):
        ours(PROMPT, latents=noise(), callback_on_step_end=lambda *a: {"latents": latents}, **OPTIONS)


def test_a_callback_of_a_compiled_model(compiled_model):
    pipe = LatentDiffusionPipeline.from_pretrained(compiled_model, device="cpu")
    extra = {"seed": 1, "num_inference_steps": 3, "output_type": "latent"}
    plain = pipe("a red circle", **extra).images
    seen = []
    zero = pipe("a red circle", callback_on_step_end=lambda p, i, t, k: {"latents": 0 * k["latents"]}, **extra).images
    same = pipe("a red circle", callback_on_step_end=lambda p, i, t, k: seen.append((i, t)) or k, **extra).images
    assert torch.equal(same, plain)
    assert not zero.any()
    assert [i for i, _ in seen] == [0, 1, 2]


# adapters, memory, loading


def test_the_scale_of_adapters(folders, tmp_path):
    from safetensors.torch import save_file

    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    pipe = load(folders["1"])
    wide = adaptable_networks(pipe.model)["unet"].get_submodule(name.removeprefix("unet.")).weight.shape[0]
    save_file(
        {f"{name}.lora_A.weight": torch.ones(1, wide), f"{name}.lora_B.weight": torch.ones(wide, 1)},
        tmp_path / "x.safetensors",
    )
    plain = pipe(PROMPT, latents=noise(), **OPTIONS).images
    pipe.load_lora_weights(tmp_path / "x.safetensors", weight=0.5)
    half = pipe(PROMPT, latents=noise(), cross_attention_kwargs={"scale": 0.5}, **OPTIONS)
    assert half.metadata[0].sources[0].weight == 0.25
    whole = pipe(PROMPT, latents=noise(), **OPTIONS).images
    pipe.set_adapters("x", 0.25)
    assert torch.equal(pipe(PROMPT, latents=noise(), **OPTIONS).images, half.images)
    assert not torch.equal(whole, half.images)
    none = pipe(PROMPT, latents=noise(), cross_attention_kwargs={"scale": 0.0}, **OPTIONS).images
    assert torch.equal(none, plain)


def test_switches(folders):
    pipe = load(folders["1"])
    pipe.enable_vae_tiling()
    pipe.enable_vae_slicing()
    record = pipe(PROMPT, seed=1, num_inference_steps=1, height=64, width=64).metadata[0]
    assert record.request["vae_tiling"]
    assert record.request["vae_slicing"]
    pipe.disable_vae_tiling()
    pipe.disable_vae_slicing()
    assert not pipe(PROMPT, seed=1, num_inference_steps=1, height=64, width=64).metadata[0].request["vae_tiling"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.set_progress_bar_config(disable=True)
    for what in ("enable_attention_slicing", "enable_xformers_memory_efficient_attention", "set_progress_bar_config"):
        with pytest.warns(UserWarning, match=f"{what} has no effect"):
            getattr(pipe, what)()


def test_arguments_of_loading(folders):
    euler = diffusers.EulerDiscreteScheduler.from_pretrained(folders["1"], subfolder="scheduler")
    usual = {"safety_checker": None, "requires_safety_checker": False, "use_safetensors": True}
    pipe = LatentDiffusionPipeline.from_pretrained(folders["1"], device="cpu", scheduler=euler, **usual)
    assert pipe.card.defaults["sampler"] == "euler"
    for options, message in (
        ({"use_safetensors": False}, "use_safetensors=False is not taken"),
        ({"safety_checker": 5}, "safety_checker=5 is not taken"),
        ({"trust_remote_code": True}, "trust_remote_code=True is not taken"),
        ({"device_map": "auto"}, "from_pretrained has no device_map. It has device"),
    ):
        with pytest.raises(ConfigError, match=message):
            LatentDiffusionPipeline.from_pretrained(included_model("scenes-64"), **options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_guidance_rescale(name, folders, theirs):
    """Of the network's output, as in the paper and in diffusers."""
    pipe, x, extra = load(folders["1"]), noise(), OPTIONS | {"guidance_scale": 7.5, "guidance_rescale": 0.7}
    for each in (pipe, theirs):
        each.scheduler = scheduler(name, each)
    close(pipe(PROMPT, latents=x, **extra).images, theirs(PROMPT, latents=x, **extra).images)


def test_the_guidance_of_sdxl(folders):
    """5, as in diffusers' pipeline; 7.5 of the others."""
    for family, scale in (("XL", 5.0), ("1", 7.5)):
        record = load(folders[family])(PROMPT, num_inference_steps=1, height=64, width=64).metadata[0]
        assert record.request["guidance_scale"] == scale
