"""A refiner: another model draws the last levels on the same latents, as in diffusers."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLImg2ImgPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from latentdiff.core.errors import ConfigError, ModelError
from latentdiff.drawing.record import read_metadata
from latentdiff.families.single_file import described, unet_config
from latentdiff.formats.folder import folder_hash
from latentdiff.formats.original import unet_name

from . import flux, stable_diffusion
from .stable_diffusion import load

PROMPT, NEGATIVE = "a castle on the hill", "blurry"
OPTIONS = {"num_inference_steps": 10, "guidance_scale": 4.0, "height": 64, "width": 64}


def refiner_of(base):
    """SDXL's refiner in its layout: one text encoder, and a score where the base reads the picture's size."""
    config = dict(base.unet.config)
    width = stable_diffusion.width("bigG", True)
    config |= {"cross_attention_dim": width, "projection_class_embeddings_input_dim": 5 * 256 + width}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        unet = UNet2DConditionModel.from_config(config)
    made = StableDiffusionXLImg2ImgPipeline(
        vae=base.vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=base.text_encoder_2,
        tokenizer_2=base.tokenizer_2,
        unet=unet,
        scheduler=DDIMScheduler(**stable_diffusion.SCHEDULE),
        requires_aesthetics_score=True,
        add_watermarker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The folders of a base and of its refiner, and diffusers' pipelines."""
    place = tmp_path_factory.mktemp("refined")
    base = stable_diffusion.pipeline("XL")
    base.scheduler = DDIMScheduler(**stable_diffusion.SCHEDULE)
    refiner = refiner_of(base)
    base.save_pretrained(place / "base")
    refiner.save_pretrained(place / "refiner")
    return place, base, refiner


def noise():
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.quick("0.55")
@pytest.mark.parametrize("switch", [0.8, 0.55, 0.3])
def test_pictures_are_those_of_diffusers(both, switch):
    place, base, refiner = both
    texts = {"prompt": PROMPT, "negative_prompt": NEGATIVE, **OPTIONS}
    half = base(**texts, latents=noise(), denoising_end=switch, output_type="latent").images
    rest = {key: value for key, value in texts.items() if key not in ("height", "width")}
    expected = refiner(**rest, image=half, denoising_start=switch, output_type="np").images
    ours = load(place / "base")
    ours.load_refiner(place / "refiner")
    options = {"sampler": "ddim", "spacing": "trailing", "latents": noise(), "output_type": "np"}
    picture = ours(PROMPT, negative_prompt=NEGATIVE, refiner_switch=switch, **options, **OPTIONS).images
    assert np.abs(picture - expected).max() < 1e-4
    alone = load(place / "base")(PROMPT, negative_prompt=NEGATIVE, **options, **OPTIONS).images
    assert np.abs(picture - alone).max() > 1e-3


def test_a_soft_mask_is_freed_once_in_the_whole_walk(both):
    """Refined by the base itself, the picture is the base's: the share of the steps counts those of both."""
    place, *_ = both
    ours, alone = load(place / "base"), load(place / "base")
    ours.load_refiner(place / "base")
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    mask = np.linspace(0, 255, 64 * 64).reshape(64, 64).astype(np.uint8)
    options = {"seed": 1, "sampler": "ddim", "spacing": "trailing", "output_type": "np", **OPTIONS}
    options |= {"image": image, "mask_image": mask}
    refined = ours(PROMPT, refiner_switch=0.5, **options).images
    np.testing.assert_allclose(refined, alone(PROMPT, **options).images, atol=1e-5)


@pytest.mark.slow
def test_the_whole_walk_is_shared(both):
    """As many steps as without a refiner; a switch after the last level is none, one before the first leaves all."""
    place, *_ = both
    ours, alone, refiner = (load(place / name) for name in ("base", "base", "refiner"))
    ours.load_refiner(place / "refiner")
    options = {"seed": 1, "sampler": "euler", "spacing": "trailing", "output_type": "np", **OPTIONS}
    assert len(list(ours.stream(PROMPT, **{k: v for k, v in options.items() if k != "output_type"}))) == 10
    late = ours(PROMPT, refiner_switch=0.9999, **options).images
    assert np.array_equal(late, alone(PROMPT, **options).images)
    early = ours(PROMPT, refiner_switch=0.0001, **options).images
    assert np.array_equal(early, refiner(PROMPT, **options).images)
    image = np.zeros((64, 64, 3), np.uint8)
    only = {**options, "image": image, "strength": 0.1}
    assert np.array_equal(ours(PROMPT, **only).images, refiner(PROMPT, **only).images)  # it starts after the switch


def test_a_refiner_alone_is_saved_and_draws(both, tmp_path):
    place, _, theirs = both
    ours = load(place / "refiner")
    ours.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert (index["_class_name"], index["text_encoder"]) == ("StableDiffusionXLImg2ImgPipeline", [None, None])
    again = StableDiffusionXLImg2ImgPipeline.from_pretrained(tmp_path / "saved")
    assert again.config.requires_aesthetics_score
    for name, tensor in theirs.unet.state_dict().items():
        assert torch.equal(again.unet.state_dict()[name], tensor), name
    assert load(tmp_path / "saved").model.backbone.spec.reads["sizes"] == (5,)


@pytest.mark.slow
def test_one_file_and_back(both, call, tmp_path):
    """A refiner is known by its one text encoder, in the first place; its file is read as its folder."""
    place, *_ = both
    file = tmp_path / "refiner.safetensors"
    assert call("convert", place / "refiner", file)[0] == 0
    names = load_file(file).keys()
    assert {"conditioner.embedders.0.model.ln_final.weight", "model.diffusion_model.label_emb.0.0.weight"} <= names
    assert described(file)["kind"] == "Stable Diffusion XL refiner, original layout"
    picture = []
    for source in (place / "refiner", file):
        ours = load(place / "base")
        ours.load_refiner(source)
        picture.append(ours(PROMPT, seed=1, sampler="euler", spacing="trailing", output_type="np", **OPTIONS).images)
    assert (picture[0] == picture[1]).all()
    assert call("convert", file, tmp_path / "again")[0] == 0
    assert folder_hash(tmp_path / "again") == folder_hash(place / "refiner")


def test_the_published_shape():
    """The config that is inferred from the shapes of the published refiner's weights is the published one."""
    published = {
        "block_out_channels": (384, 768, 1536, 1536),
        "attention_head_dim": (6, 12, 24, 24),
        "cross_attention_dim": 1280,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
        "transformer_layers_per_block": 4,
        "projection_class_embeddings_input_dim": 2560,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "use_linear_projection": True,
        "sample_size": 128,
    }
    with torch.device("meta"):
        unet = UNet2DConditionModel(**published)
        names = {f"model.diffusion_model.{unet_name(name, unet.config)}": t for name, t in unet.state_dict().items()}
        implied = unet_config(names, "XL refiner")
        again = UNet2DConditionModel(**implied)
    depths = implied.pop("transformer_layers_per_block")
    assert [implied[name] for name in published if name in implied] == [v for n, v in published.items() if n in implied]
    assert depths == (1, 4, 4, 4), "where a level has no attention the number has no effect"
    assert {name: t.shape for name, t in again.state_dict().items()} == {
        name: t.shape for name, t in unet.state_dict().items()
    }


def test_by_the_command_line(both, call, tmp_path):
    place, *_ = both
    words = ("generate", PROMPT, "-m", place / "base", "--size", "64x64", "--steps", 4, "-s", 1, "-o", "a.png")
    code, _, err = call(*words, "--refiner", place / "refiner", "--set", "refiner_switch=0.5")
    assert code == 0, err
    (source,) = read_metadata(tmp_path / "a.png")["latentdiff"]["sources"]
    assert source["kind"] == "refiner"
    parameters = read_metadata(tmp_path / "a.png")["parameters"]
    assert "Refiner: refiner, Refiner switch at: 0.5" in parameters
    code, out, err = call("reproduce", "a.png", "-m", place / "base", "--source", place)
    assert (code, out.startswith("equal")) == (0, True), err


def test_what_does_not_fit_is_refused(both, tmp_path):
    place, *_ = both
    pipe = load(place / "base")
    with pytest.raises(ConfigError, match="refiner_switch requires a refiner"):
        pipe(PROMPT, refiner_switch=0.5, **OPTIONS)
    flux.pipeline().save_pretrained(tmp_path / "flux")
    with pytest.raises(ModelError, match="the refiner must have the same latents and noise schedule"):
        pipe.load_refiner(tmp_path / "flux")
    pipe.load_refiner(place / "refiner")
    with pytest.raises(ConfigError, match="a refiner supports neither pag_scale"):
        pipe(PROMPT, pag_scale=2.0, **OPTIONS)
