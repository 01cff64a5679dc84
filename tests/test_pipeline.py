"""The pipeline: equal to diffusers on the same folder, and a function of seeds alone."""

import base64
import io
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from latentdiff import LatentDiffusionPipeline
from latentdiff.core.errors import ConfigError, ModelError
from latentdiff.diffusion.path import VariancePreserving
from latentdiff.drawing.record import read_metadata

PROMPT = "a red circle above a blue square"


def numpy_images(pipe, prompt=PROMPT, **settings):
    return pipe(prompt, output_type="uint8", **settings).images


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_equal_to_diffusers(pipe, tiny_model, guidance_scale):
    """StableDiffusionPipeline with its DDIM, the same latents and 20 steps draws the same picture."""
    from diffusers import StableDiffusionPipeline

    theirs = StableDiffusionPipeline.from_pretrained(tiny_model)
    theirs.set_progress_bar_config(disable=True)
    latents = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    settings = {"num_inference_steps": 20, "guidance_scale": guidance_scale}
    expected = theirs([PROMPT] * 2, latents=latents.clone(), output_type="np", **settings).images
    picture = numpy_images(pipe, num_images_per_prompt=2, latents=latents, spacing="trailing", **settings)
    assert np.abs(picture / 255 - expected).max() <= 1.01 / 255 / 2 + 2e-3


def test_same_seed_same_bits(pipe):
    first, again = (numpy_images(pipe, seed=3, num_images_per_prompt=3) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert (first[0] != first[1]).any()


def test_a_picture_does_not_depend_on_its_batch(pipe):
    """The noise is bitwise the same; the kernels' rounding may differ by batch size."""
    together = pipe(PROMPT, seed=3, num_images_per_prompt=4, output_type="latent").images
    alone = pipe(PROMPT, seed=5, output_type="latent").images
    torch.testing.assert_close(together[2:3], alone, rtol=1e-3, atol=1e-3)
    apart = pipe(PROMPT, seed=3, num_images_per_prompt=4, batch_size=3, output_type="latent").images
    torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m_sde"])
def test_step_noise_is_keyed_by_seed_too(pipe, sampler):
    settings = {"sampler": sampler, "num_inference_steps": 5, "output_type": "latent"}
    together = pipe(PROMPT, seed=3, num_images_per_prompt=3, **settings).images
    torch.testing.assert_close(together[1:2], pipe(PROMPT, seed=4, **settings).images, rtol=1e-3, atol=1e-3)


def test_several_prompts_count_on(pipe):
    out = pipe([PROMPT, "three green stars"], seed=10, num_images_per_prompt=2, output_type="uint8", batch_size=4)
    assert out.seeds == [10, 11, 12, 13]
    alone = pipe("three green stars", seed=12, output_type="uint8").images
    assert np.abs(out.images[2].astype(int) - alone[0]).max() <= 1


def test_prompt_and_guidance_change_the_picture(pipe):
    base = numpy_images(pipe, seed=1)
    assert (numpy_images(pipe, "a green star", seed=1) != base).any()
    assert (numpy_images(pipe, seed=1, guidance_scale=6.0) != base).any()
    assert (numpy_images(pipe, seed=1, negative_prompt="black") != base).any()
    interval = {"guidance_interval": (10.0, 11.0), "seed": 1}
    np.testing.assert_array_equal(numpy_images(pipe, **interval), numpy_images(pipe, seed=1, guidance_scale=1.0))


def test_stream_ends_in_the_picture(pipe):
    steps = list(pipe.stream(PROMPT, seed=7))
    assert [step.number for step in steps] == list(range(1, 11))
    assert [step.level.t for step in steps][-2:] == [99, -1]
    final = pipe(PROMPT, seed=7, output_type="latent").images
    assert torch.equal(steps[-1].x, final)


def test_stream_leaves_the_caller_s_gradients_alone(pipe):
    step = next(pipe.stream(PROMPT, seed=7))
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert not step.x.requires_grad


def test_output_types_agree(pipe):
    latents = pipe(PROMPT, seed=1, output_type="latent").images
    images = pipe(PROMPT, seed=1, output_type="pt").images
    torch.testing.assert_close((pipe.decode(latents) + 1) / 2, images)
    assert 0 <= images.min() < images.max() <= 1, "as diffusers gives them"
    values = pipe(PROMPT, seed=1, output_type="np").images
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, images.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    pictures = pipe(PROMPT, seed=1, output_type="uint8").images
    np.testing.assert_array_equal(pictures, np.rint(values * 255).astype(np.uint8))
    pil = pipe(PROMPT, seed=1).images[0]
    assert isinstance(pil, Image.Image)
    np.testing.assert_array_equal(np.asarray(pil), pictures[0])


def test_other_sizes(pipe):
    assert numpy_images(pipe, width=96, height=64, num_inference_steps=2).shape == (1, 64, 96, 3)


def test_save_and_load_round_trip(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "copy")
    again = LatentDiffusionPipeline.from_pretrained(tmp_path / "copy", device="cpu")
    np.testing.assert_array_equal(numpy_images(again, seed=2), numpy_images(pipe, seed=2))
    assert again.card.hash == pipe.card.hash
    again.load_clip()
    np.testing.assert_allclose(again.model.path.alphas_cumprod, pipe.model.path.alphas_cumprod, rtol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("terminal", [False, True])
def test_schedules_survive_diffusers_format(kind, terminal, tmp_path):
    """Both readings of the written scheduler, ours and diffusers', give the schedule back."""
    import json

    from diffusers import DDIMScheduler

    from latentdiff.diffusion.path import schedule_named
    from latentdiff.families.scheduler import read_scheduler, scheduler_config

    schedule = schedule_named(kind, 1000)
    schedule = schedule.zero_terminal_snr() if terminal else schedule
    config = scheduler_config(schedule, "v_prediction", "trailing")
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    ours, prediction, *_ = read_scheduler(tmp_path)
    assert prediction == "v_prediction"
    np.testing.assert_allclose(ours.alphas_cumprod, schedule.alphas_cumprod, rtol=1e-9, atol=1e-15)
    theirs = DDIMScheduler.from_config(config)
    np.testing.assert_allclose(theirs.alphas_cumprod.numpy(), schedule.alphas_cumprod, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 7}, "width must be a multiple of 2 from 2 to 2048 (got 7)"),
        ({"height": 4096}, "height must be a multiple of 2 from 2 to 2048 (got 4096)"),
        ({"sampler": "magic"}, "unknown sampler 'magic'; one of ddpm, ddim, euler"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 10**6}, "num_inference_steps"),
        ({"num_inference_steps": True}, "num_inference_steps"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 2**64 - 1, "num_images_per_prompt": 2}, "seed"),
        ({"num_images_per_prompt": 10**9}, "num_images"),
        ({"output_type": "jpg"}, "unknown output_type 'jpg'"),
        ({"stepps": 3}, "stepps"),
        (
            {"num_inference_steps": 1000, "latents": torch.zeros(1, 4, 5, 5)},
            "latents must have the shape (1, 4, 32, 32)",
        ),
        ({"latents": torch.zeros(5, 4, 32, 32), "batch_size": 1}, "latents must have the shape (1, 4, 32, 32)"),
        ({"latents": "x"}, "latents must be a tensor of shape (1, 4, 32, 32) (got str)"),
        ({"num_images": 3}, "use num_images_per_prompt instead of num_images"),
        ({"callback": print}, "use callback_on_step_end, or stream"),
        ({"sampler": "unipc", "eta": 0.5}, "eta has no effect on unipc; it applies to"),
        ({"guidance_interval": (5.0, -5.0)}, "the lower end must come first"),
        ({"steps": 5}, "unknown setting 'steps' (did you mean num_inference_steps?)"),
        ({"mask": 5}, "unknown setting 'mask' (did you mean mask_image?)"),
        ({"prompt_embeds": torch.zeros(1, 32, 9)}, "prompt_embeds replace the prompt"),
    ],
)
def test_refused_settings(pipe, settings, message):
    with pytest.raises(ConfigError) as caught:
        pipe(PROMPT, **settings)
    assert message in str(caught.value)


@pytest.mark.parametrize("prompt", ["x" * 10_000_000, [], 5, None, [5], ["a red circle", None]])
def test_refused_prompts(pipe, prompt):
    with pytest.raises(ConfigError, match="prompt") as caught:
        pipe(prompt)
    assert len(str(caught.value)) < 200


def test_more_steps_than_the_model_has(pipe):
    short = LatentDiffusionPipeline(replace(pipe.model, path=VariancePreserving.cosine(100)))
    with pytest.raises(ConfigError, match="must be at most 100"):
        short(PROMPT, num_inference_steps=200)


def test_seeds_may_be_numpy_s_or_none(pipe):
    settings = {"num_inference_steps": 1, "output_type": "latent"}
    assert torch.equal(pipe(PROMPT, seed=np.int64(3), **settings).images, pipe(PROMPT, seed=3, **settings).images)
    first, again = (pipe(PROMPT, seed=None, **settings) for _ in range(2))
    assert first.seeds != again.seeds


def test_own_latents_are_noted(pipe):
    picture = pipe(PROMPT, seed=1, num_inference_steps=1, latents=torch.zeros(1, 4, 32, 32))
    assert picture.metadata[0].own_noise
    assert not pipe(PROMPT, seed=1, num_inference_steps=1).metadata[0].own_noise


def test_eta_of_euler_ancestral(pipe):
    """Without its noise it is Euler."""
    settings = {"seed": 1, "num_inference_steps": 4, "output_type": "latent"}
    still = pipe(PROMPT, sampler="euler_ancestral", eta=0.0, **settings).images
    torch.testing.assert_close(still, pipe(PROMPT, sampler="euler", **settings).images)
    assert (pipe(PROMPT, sampler="euler_ancestral", **settings).images != still).any()


@pytest.mark.parametrize(
    ("embeds", "message"),
    [
        ({"prompt_embeds": torch.zeros(1, 32, 9)}, r"prompt_embeds must have 32 numbers a token \(got 9\)"),
        ({"prompt_embeds": torch.zeros(1, 32, 32, device="meta")}, "must be floating-point numbers"),
        ({"prompt_embeds": torch.zeros(1, 32, 32, dtype=torch.int64)}, "must be floating-point numbers"),
        (
            {"prompt_embeds": torch.zeros(1, 32, 32)} | dict(negative_prompt_embeds=torch.zeros(1, 32, 32)),
            "negative_prompt_embeds replace the negative_prompt",
        ),
    ],
)
def test_refused_embeds(pipe, embeds, message):
    with pytest.raises(ConfigError, match=message):
        pipe(negative_prompt="red", **embeds)


def test_saved_pictures_say_how_they_were_made(pipe, tmp_path):
    picture = pipe(PROMPT, seed=3, num_inference_steps=1, num_images_per_prompt=2)
    paths = picture.save(tmp_path / "drawn")
    assert [path.name for path in paths] == ["00001-3.png", "00002-4.png"]
    for path, image in zip(paths, picture.images, strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(image))
    assert read_metadata(paths[1])["latentdiff"]["seed"] == 4
    with pytest.raises(ConfigError, match="2 pictures do not go into one file"):
        picture.save(tmp_path / "one.png")
    with pytest.raises(ConfigError, match="only PIL images"):
        pipe(PROMPT, num_inference_steps=1, output_type="uint8").save(tmp_path / "drawn")


@pytest.mark.parametrize(("move", "message"), [("to", "device 'bogus'"), ("offload", "device 'bogus'")])
def test_nothing_is_moved_to_no_place(pipe, move, message):
    with pytest.raises(ConfigError, match=message):
        getattr(pipe, move)("bogus")
    with pytest.raises(ConfigError, match="torch_dtype must be"):
        pipe.to(dtype=torch.int64)
    assert (pipe.device.type, pipe.model.backbone.dtype) == ("cpu", torch.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "bogus"}, "device 'bogus' cannot be used here"),
        ({"device": "meta"}, "device 'meta' cannot be used here"),
        ({"torch_dtype": "int8"}, r"floating-point torch.dtype of 16 bits or more \(got torch.int8\)"),
    ],
)
def test_refused_places(tiny_model, options, message):
    with pytest.raises(ConfigError, match=message):
        LatentDiffusionPipeline.from_pretrained(tiny_model, **options)


def test_missing_folder(tmp_path):
    with pytest.raises(ModelError, match="no such model folder"):
        LatentDiffusionPipeline.from_pretrained(tmp_path / "none")


def test_pictures_show_themselves_in_a_notebook(pipe):
    """Each with its prompt, escaped, and its seed; notes below; other output as text."""
    out = pipe(["a <b>cat</b>", "a ring"], seed=3, num_inference_steps=1)
    page = out._repr_html_()
    encoded = re.findall(r"base64,([^']+)'", page)
    for image, text in zip(out.images, encoded, strict=True):
        with Image.open(io.BytesIO(base64.b64decode(text))) as view:
            assert np.array_equal(np.asarray(view), np.asarray(image))
    assert "a &lt;b&gt;cat&lt;/b&gt; (seed 3)" in page
    assert "a ring (seed 4)" in page
    assert "<p>scenes-tiny has never seen: b, cat</p>" in page
    assert pipe("a ring", seed=3, num_inference_steps=1, output_type="latent")._repr_html_().startswith("Output(")
