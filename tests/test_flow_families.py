"""Z-Image, FLUX.2 klein and Qwen-Image: each draws what diffusers' pipeline draws of the same folder."""

import copy
import json
import shutil
from functools import cache, partial

import diffusers
import numpy as np
import pytest
import torch

from latentdiff.core.errors import ConfigError, ModelError
from latentdiff.diffusion import guidance
from latentdiff.diffusion.level import NoiseLevel
from latentdiff.diffusion.path import Straight
from latentdiff.drawing.latents import from_diffusers
from latentdiff.drawing.record import read_metadata
from latentdiff.families.loading import included_model
from latentdiff.networks.backbones.packing import packed
from latentdiff.networks.conditions import Conditions, stacked
from latentdiff.networks.encoders.prompt import Prompt
from latentdiff.networks.protocols import ShowsLatents

from . import flow_models
from .stable_diffusion import load

PROMPT = "a castle on the hill"
SMALL = {"width": 64, "height": 64}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name in flow_models.MAKERS:
        made[name] = tmp_path_factory.mktemp("flow") / name.replace(" ", "-")
        flow_models.pipeline(name).save_pretrained(made[name])
    return made


@pytest.fixture(scope="module", params=flow_models.MAKERS)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(folders, family):
    return folders[family]


@pytest.fixture(scope="module")
def pipe(folder):
    return load(folder)


@cache
def theirs(folder):
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(pipe, height, width):
    shape = pipe.model.codec.shape((height, width))
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))


def diffusers_picture(folder, family, x, *, scale, negative="", output_type="pt", **settings):
    """diffusers' picture, (1, 3, H, W) in [0, 1]. scale: of classifier-free guidance, 1 for none."""
    if family == "Z-Image":  # their scale is how far beyond the conditional
        settings |= {"guidance_scale": scale - 1, "negative_prompt": negative, "latents": x}
    elif family == "Qwen-Image":
        settings |= {"true_cfg_scale": scale, "negative_prompt": negative, "latents": packed(x)}
    else:
        settings |= {"guidance_scale": scale, "latents": x}
    return theirs(folder)(prompt=PROMPT, output_type=output_type, **settings).images


def test_latents_are_those_of_diffusers(folder, pipe, family):
    x, settings = noise(pipe, 64, 64), {"num_inference_steps": 2, **SMALL}
    expected = diffusers_picture(folder, family, x, scale=1.0, output_type="latent", **settings)
    picture = pipe(PROMPT, latents=x, guidance_scale=1.0, output_type="latent", **settings).images
    torch.testing.assert_close(picture, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 4, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
def test_pictures_are_those_of_diffusers(folder, pipe, family, steps, scale, size):
    """To rounding, for the same noise."""
    if family.endswith("distilled") and scale != 1:
        pytest.skip("its pipeline has no guidance")
    height, width = size
    x = noise(pipe, height, width)
    settings = {"num_inference_steps": steps, "width": width, "height": height}
    picture = pipe(PROMPT, latents=x, guidance_scale=scale, output_type="pt", **settings).images
    if family == "Qwen-Image" and steps == 1:  # theirs divides zero by zero, for the last level is the first
        assert torch.isfinite(picture).all()
        with pytest.raises(RuntimeWarning, match="invalid value encountered in divide"):
            diffusers_picture(folder, family, x, scale=scale, **settings)
        return
    expected = diffusers_picture(folder, family, x, scale=scale, **settings)
    assert expected.std() > 0.02, "a flat picture would hide faults"
    torch.testing.assert_close(picture, expected, rtol=0, atol=2e-4)
    if (scale, steps) == (4.0, 4):
        plain = pipe(PROMPT, latents=x, guidance_scale=1.0, output_type="pt", **settings).images
        assert (plain - picture).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["Z-Image", "Qwen-Image"])
def test_negative_prompts_are_those_of_diffusers(folders, name):
    ours = load(folders[name])
    x = noise(ours, 64, 64)
    settings = {"num_inference_steps": 3, **SMALL}
    picture = ours(
        PROMPT, negative_prompt="blurry, a boat", latents=x, guidance_scale=4.0, output_type="pt", **settings
    )
    expected = diffusers_picture(folders[name], name, x, scale=4.0, negative="blurry, a boat", **settings)
    torch.testing.assert_close(picture.images, expected, rtol=0, atol=2e-4)


def test_defaults_and_sizes(pipe, family):
    request = pipe.request(PROMPT, seed=0)
    usual = {
        "Z-Image": (8, 1.0, False),
        "FLUX.2 klein": (50, 4.0, False),
        "FLUX.2 klein distilled": (4, 1.0, False),
        "Qwen-Image": (50, 4.0, True),
    }
    assert (request.num_inference_steps, request.guidance_scale, request.guidance_renorm) == usual[family]
    assert (request.sampler, request.spacing) == ("euler", "trailing")
    assert (pipe.card.size, pipe.model.multiple, pipe.card.notes) == ((1024, 1024), 16, ())
    with pytest.raises(ConfigError, match="multiple of 16"):
        pipe(PROMPT, width=40, height=64)


def test_latents_have_the_statistics_of_the_config(folder, pipe):
    """Decoding what was encoded equals diffusers' own way there and back."""
    ours, vae = pipe.model.codec, theirs(folder).vae
    image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = ours.latents_of(image)
    assert tuple(latents.shape[1:]) == ours.shape((64, 96))
    frames = isinstance(vae, diffusers.AutoencoderKLQwenImage)
    with torch.no_grad():
        there = vae.encode(image.unsqueeze(2) if frames else image).latent_dist.mean
        back = vae.decode(there).sample
    torch.testing.assert_close(ours.images_of(latents), back.squeeze(2) if frames else back, rtol=1e-4, atol=1e-4)


def test_a_batch_is_its_pictures(pipe):
    """Prompts of different lengths in one batch, each equal to the same alone."""
    backbone, encoder = pipe.model.backbone, pipe.model.encoder
    spec = backbone.spec
    x = torch.randn(2, spec.inputs, 4, 6, generator=torch.Generator().manual_seed(2))
    each = [encoder.encode(Prompt(text)) for text in ("a cat", "a very long castle on the hill by the sea")]
    whole = backbone.predict(x, 500.0, stacked(each))
    for row, conditions in enumerate(each):
        alone = backbone.predict(x[row : row + 1], 500.0, stacked([conditions]))
        torch.testing.assert_close(whole[row : row + 1], alone, rtol=1e-4, atol=1e-4)


def test_padding_after_the_prompt_counts_for_nothing(folders):
    for name in ("Z-Image", "Qwen-Image"):
        model = load(folders[name]).model
        x = torch.randn(1, model.backbone.spec.inputs, 4, 4, generator=torch.Generator().manual_seed(2))
        conditions = stacked([model.encoder.encode(Prompt(PROMPT))])
        tokens, mask = conditions["tokens"], conditions["mask"]
        assert (tokens[mask == 0] == 0).all()
        filled = Conditions({"tokens": tokens + 7 * (1 - mask[..., None]), "mask": mask})
        assert torch.equal(model.backbone.predict(x, 500.0, filled), model.backbone.predict(x, 500.0, conditions))


def test_prompts_that_are_too_long_are_cut(pipe):
    encoder = pipe.model.encoder
    short, long = encoder.read(PROMPT), encoder.read("a" * 2000)
    assert (short.cut, long.cut) == (0, short.tokens - len(PROMPT) + 2000 - encoder.length)
    assert encoder.encode(Prompt("a" * 2000))["tokens"].shape == (encoder.length, encoder.width)


def test_weights_of_words_are_text(pipe):
    """A note says that a language model has no weights of words; brackets stay text."""
    output = pipe("a (red:1.5) castle", seed=1, num_inference_steps=1, **SMALL)
    assert output.notes == ["prompt: this model has no word weights: brackets are text"]
    (note,) = pipe.model.encoder.read("a clock (10:30)").notes
    assert f"prompt: {note}" == output.notes[0], "a number of any size is text"
    assert not pipe("a (red) castle", seed=1, num_inference_steps=1, prompt_weights=False, **SMALL).notes
    read = pipe.model.encoder._ids("a (red:1.5) castle")
    assert "a (red:1.5) castle" in pipe.model.encoder.tokenizer.decode(read)
    with pytest.raises(ConfigError, match="Name adapters by --lora"):
        pipe("a castle <lora:x:1>", seed=1, **SMALL)


def test_picture_to_picture_and_masks(pipe):
    """A strength of nearly nothing keeps the picture, and what is masked alone changes."""
    image = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    start = pipe.model.codec.latents_of(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1)
    settings = {"num_inference_steps": 10, "seed": 1, "output_type": "latent"}

    def latents_of(**options):
        picture = pipe(PROMPT, image=image, **options, **settings).images
        return from_diffusers(pipe.model, picture, tuple(start.shape))

    start = start if not isinstance(pipe.model.codec, ShowsLatents) else pipe.model.codec.to_diffusers(start)
    near, far = latents_of(strength=0.1), latents_of(strength=0.9)
    assert (near - start).abs().mean() < 0.5 * (far - start).abs().mean()
    mask = np.zeros((64, 64), np.uint8)
    mask[:32] = 255
    picture = latents_of(mask_image=mask)
    rows = start.shape[2] // 2
    torch.testing.assert_close(picture[:, :, rows + 1 :], start[:, :, rows + 1 :], rtol=0, atol=1e-5)
    assert (picture[:, :, : rows - 1] - start[:, :, : rows - 1]).abs().mean() > 0.1


def test_another_vae(folder, pipe, tmp_path):
    """One of the same class takes the place of the folder's, to the bit; one with other latents is refused."""
    options = {"num_inference_steps": 1, "seed": 1, "output_type": "pt", **SMALL}
    expected = pipe(PROMPT, **options).images
    again = load(folder)
    changed = copy.deepcopy(again.components["vae"])
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter *= 1.1
    changed.save_pretrained(tmp_path / "vae")
    again.load_vae(tmp_path / "vae")
    assert not torch.equal(again(PROMPT, **options).images, expected)
    again.load_vae(folder)
    assert torch.equal(again(PROMPT, **options).images, expected)
    with pytest.raises(ModelError, match="this VAE does not fit the model"):
        again.load_vae(included_model("scenes-64"))


def test_saved_folders_load_in_diffusers(folder, pipe, family, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    before, after = (json.loads((path / "model_index.json").read_text()) for path in (folder, tmp_path / "saved"))
    assert (after["_class_name"], after["scheduler"]) == (before["_class_name"], before["scheduler"])
    assert after.get("is_distilled") == before.get("is_distilled")
    again = load(tmp_path / "saved")
    assert (again.card.hash, again.model.path) == (pipe.card.hash, pipe.model.path)
    assert again.request(PROMPT, seed=0) == pipe.request(PROMPT, seed=0)
    x, settings = noise(pipe, 64, 64), {"num_inference_steps": 2, "scale": 1.0, **SMALL}
    expected = diffusers_picture(folder, family, x, **settings)
    torch.testing.assert_close(diffusers_picture(tmp_path / "saved", family, x, **settings), expected)


def test_shift_is_that_of_diffusers(folders):
    """FLUX.2's grows with the number of tokens and of steps, Qwen-Image's ends at 0.02."""
    path = load(folders["FLUX.2 klein"]).model.path
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    for tokens, steps in ((256, 4), (1024, 28), (4096, 50), (4301, 4), (8000, 50)):
        assert np.log(path.shift_of(tokens, steps)) == pytest.approx(compute_empirical_mu(tokens, steps), rel=1e-9)
    levels = load(folders["Qwen-Image"]).model.path.levels(20, "trailing", 1024)
    assert levels[0].sigma == 1
    assert levels[-2].sigma == pytest.approx(0.02)
    assert Straight(terminal=0.02).levels(1)[0].sigma == 1


def test_renormed_guidance_keeps_the_length_of_each_token():
    rng = np.random.default_rng(0)
    cond, guided = rng.standard_normal((2, 1, 3, 4, 6))
    level, x = NoiseLevel(500.0, 0.5, 0.5), rng.standard_normal((1, 3, 4, 6))
    for put in (np.asarray, torch.from_numpy):
        data, both, one = put(x), put(guided), put(cond)
        made = guidance.renormed(partial(_constant, both), partial(_constant, one), 2, "flow")(data, level)
        output, plain, before = ((data - each) / level.sigma for each in (made, one, both))
        for row in range(0, 4, 2):
            for column in range(0, 6, 2):
                own, wanted, direction = (
                    np.asarray(each[0, :, row : row + 2, column : column + 2]).ravel()
                    for each in (output, plain, before)
                )
                assert np.linalg.norm(own) == pytest.approx(np.linalg.norm(wanted))
                np.testing.assert_allclose(own / np.linalg.norm(own), direction / np.linalg.norm(direction))


def _constant(value, x, level):
    return value


def test_networks_that_do_not_fit_are_refused(folders, tmp_path):
    for name, change, message in (
        ("Z-Image", {"layers": 1}, "the weights hold|layers"),
        ("Qwen-Image", {}, "reads tokens of"),
    ):
        place = tmp_path / name
        shutil.copytree(folders[name], place)
        if change:
            config = json.loads((place / "text_encoder" / "config.json").read_text())
            config["num_hidden_layers"] = 0
            (place / "text_encoder" / "config.json").write_text(json.dumps(config))
        else:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                flow_models.QwenImageTransformer2DModel(
                    in_channels=64, out_channels=16, num_layers=1, attention_head_dim=16, num_attention_heads=2,
                    joint_attention_dim=40, axes_dims_rope=(4, 6, 6),
                ).save_pretrained(place / "transformer")  # fmt: skip
        with pytest.raises(ModelError, match=message):
            load(place)


def test_by_the_command_line(folders, call, tmp_path):
    folder = folders["Z-Image"]
    words = ("generate", PROMPT, "-m", folder, "-W", 64, "-H", 64, "--steps", 2, "-s", 1, "-o", tmp_path / "out")
    assert call(*words)[0] == 0
    (path,) = (tmp_path / "out").iterdir()
    assert read_metadata(path)["latentdiff"]["request"]["num_inference_steps"] == 2
    code, out, _ = call("reproduce", path, "--model", folder)
    assert (code, "equal: all" in out) == (0, True)
