"""IP-Adapters: the pictures are those of diffusers' pipelines, with the same weights and noise."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from diffusers.image_processor import IPAdapterMaskProcessor
from PIL import Image
from safetensors.torch import save_file

from latentdiff import LatentDiffusionPipeline
from latentdiff.core.errors import ConfigError, ModelError, UnsafeError
from latentdiff.diffusion.process import diffuse
from latentdiff.drawing.image_prompts import layer_scales
from latentdiff.drawing.record import read_metadata

from . import ip_adapters, stable_diffusion
from .stable_diffusion import load

PROMPT, NEGATIVE = "a castle on the hill", "blurry"
OURS = {"sampler": "ddim", "spacing": "trailing", "output_type": "np"}
SIZE = {"height": 48, "width": 64}
OPTIONS = {"num_inference_steps": 4, "guidance_scale": 4.0, "negative_prompt": NEGATIVE, **SIZE}
KINDS = ("plain", "plus", "full")


@pytest.fixture(scope="module", params=["1", *(pytest.param(each, marks=pytest.mark.slow) for each in ("2", "XL"))])
def place(request, tmp_path_factory):
    """A model and three adapters beside their image encoder, as on the hub."""
    folder = tmp_path_factory.mktemp("prompted")
    return made(folder, request.param), request.param


def made(folder, family, kinds=KINDS):
    base = stable_diffusion.pipeline(family)
    base.save_pretrained(folder / "model")
    ip_adapters.image_encoder().save_pretrained(folder / "hub" / "models" / "image_encoder")
    for kind in kinds:
        save_file(ip_adapters.state(base.unet, kind), folder / "hub" / "models" / f"{kind}.safetensors")
    return folder


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, size, np.uint8)) for size in ((48, 64, 3), (60, 50, 3), (32, 32, 3))]


def noise():
    return torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(3))


def with_adapters(pipe, folder, kinds):
    names = [f"{kind}.safetensors" for kind in kinds]
    pipe.load_ip_adapter(str(folder / "hub"), subfolder="models", weight_name=names if len(names) > 1 else names[0])
    return pipe


def theirs(family, folder, kinds):
    pipe = with_adapters(stable_diffusion.pipeline(family), folder, kinds)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ours(folder, kinds):
    return with_adapters(load(folder / "model"), folder, kinds)


@pytest.mark.quick("1-guided-plain", "1-guided-plus", "1-guided-full", "1-unguided-plus")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 1.0}], ids=["guided", "unguided"])
def test_as_diffusers_draws(place, pictures, kind, settings):
    folder, family = place
    options = {**OPTIONS, **settings}
    pipe, own = theirs(family, folder, [kind]), ours(folder, [kind])
    picture = {}
    for scale in (1.0, 0.4):
        pipe.set_ip_adapter_scale(scale)
        own.set_ip_adapter_scale(scale)
        options["ip_adapter_image"] = pictures[0]
        expected = pipe(PROMPT, latents=noise(), output_type="np", **options).images
        picture[scale] = own(PROMPT, latents=noise(), **options, **OURS).images
        assert np.abs(picture[scale] - expected).max() < 1e-4
    assert np.abs(picture[1.0] - picture[0.4]).max() > 1e-3, "it steers"
    own.unload_ip_adapter()
    options.pop("ip_adapter_image")
    plain = own(PROMPT, latents=noise(), **options, **OURS).images
    assert (plain == load(folder / "model")(PROMPT, latents=noise(), **options, **OURS).images).all()


def test_of_xl(tmp_path, pictures):
    """Once in the quick suite; the other families' proofs are slow."""
    folder = made(tmp_path, "XL", ["plus"])
    options = {"ip_adapter_image": pictures[0], **OPTIONS}
    expected = theirs("XL", folder, ["plus"])(PROMPT, latents=noise(), output_type="np", **options).images
    picture = ours(folder, ["plus"])(PROMPT, latents=noise(), **options, **OURS).images
    assert np.abs(picture - expected).max() < 1e-4


def test_several_pictures_of_several_adapters(place, pictures):
    folder, family = place
    kinds, view = ["plain", "plus"], [[pictures[0], pictures[1]], [pictures[2]]]
    pipe, own = theirs(family, folder, kinds), ours(folder, kinds)
    pipe.set_ip_adapter_scale([0.7, 0.5])
    expected = pipe(PROMPT, latents=noise(), ip_adapter_image=view, output_type="np", **OPTIONS).images
    scales = {"ip_adapter_scale": [0.7, 0.5]}
    picture = own(PROMPT, latents=noise(), ip_adapter_image=view, **scales, **OPTIONS, **OURS).images
    assert np.abs(picture - expected).max() < 1e-4


def test_masks(place, pictures):
    """Each picture acts in its part of the drawn one."""
    folder, family = place
    left, right = np.zeros((48, 64), np.uint8), np.zeros((48, 64), np.uint8)
    left[:, :32], right[:, 32:] = 255, 255
    masks = IPAdapterMaskProcessor().preprocess([Image.fromarray(left), Image.fromarray(right)], height=48, width=64)
    given = [masks.reshape(1, 2, 48, 64)]
    pipe, own = theirs(family, folder, ["plain"]), ours(folder, ["plain"])
    options = {"ip_adapter_image": [pictures[:2]], "cross_attention_kwargs": {"ip_adapter_masks": given}, **OPTIONS}
    expected = pipe(PROMPT, latents=noise(), output_type="np", **options).images
    picture = own(PROMPT, latents=noise(), **options, **OURS).images
    assert np.abs(picture - expected).max() < 1e-4
    options["cross_attention_kwargs"] = {"ip_adapter_masks": [[left, Image.fromarray(right)]]}
    assert (own(PROMPT, latents=noise(), **options, **OURS).images == picture).all()


def test_scales_by_block(place, pictures):
    folder, family = place
    pipe, own = theirs(family, folder, ["plain"]), ours(folder, ["plain"])
    blocks = {"XL": {"up": {"block_0": [0.3, 1.0]}, "mid": 0.5}, "1": {"down": {"block_0": [1.0]}, "up": 0.5}}
    scale = blocks.get(family, blocks["1"])
    pipe.set_ip_adapter_scale(scale)
    own.set_ip_adapter_scale(scale)
    options = {"ip_adapter_image": pictures[0], **OPTIONS}
    expected = pipe(PROMPT, latents=noise(), output_type="np", **options).images
    assert np.abs(own(PROMPT, latents=noise(), **options, **OURS).images - expected).max() < 1e-4


def test_features_instead_of_pictures(place, pictures):
    folder, family = place
    pipe, own = theirs(family, folder, ["plus"]), load(folder / "model")
    own.load_ip_adapter(folder / "hub" / "models" / "plus.safetensors", image_encoder_folder=None)
    embeds = pipe.prepare_ip_adapter_image_embeds([pictures[0]], None, "cpu", 1, True)
    expected = pipe(PROMPT, latents=noise(), ip_adapter_image_embeds=embeds, output_type="np", **OPTIONS).images
    out = own(PROMPT, latents=noise(), ip_adapter_image_embeds=embeds, **OPTIONS, **OURS)
    assert np.abs(out.images - expected).max() < 1e-4
    assert out.metadata[0].own_noise, "nobody can draw it again from its record"
    with pytest.raises(ConfigError, match="loaded without an image encoder"):
        own(PROMPT, ip_adapter_image=pictures[0], **OPTIONS, **OURS)


def test_over_a_picture(place, pictures):
    folder, family = place
    if family != "1":
        pytest.skip("an image prompt knows nothing of the start")
    pipe = StableDiffusionImg2ImgPipeline(**theirs(family, folder, ["plain"]).components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    own = ours(folder, ["plain"])
    level = own.model.path.levels(10, "trailing")[4]
    x = diffuse(own.encode(np.asarray(pictures[0])[None]), noise(), level)
    pipe.prepare_latents = lambda *_, **__: x  # theirs draws the posterior, and noise of its own
    options = {"image": pictures[0], "ip_adapter_image": pictures[1], "num_inference_steps": 10, "strength": 0.65}
    expected = pipe(PROMPT, guidance_scale=3.0, output_type="np", **options).images
    picture = own(PROMPT, guidance_scale=3.0, latents=noise(), **options, **OURS).images
    assert np.abs(picture - expected).max() < 1e-4


@pytest.mark.slow
def test_in_every_other_way(place, pictures):
    """Beside a mask, a second pass, other guidance, reused features; a batch; and as fast as it gets."""
    folder, family = place
    if family != "1":
        pytest.skip("the ways know nothing of the family")
    own = ours(folder, ["plain"])
    mask = np.zeros((48, 64), np.uint8)
    mask[10:30, 20:50] = 255
    small = {"num_inference_steps": 3, "seed": 1, "output_type": "uint8", "ip_adapter_image": pictures[1]}
    ways = [
        {"image": pictures[0], "mask_image": mask},
        {"hires_scale": 2.0, **SIZE},
        {"pag_scale": 2.0, **SIZE},
        {"cache_interval": 2, **SIZE},
        {"num_images_per_prompt": 3, "batch_size": 2, **SIZE},
    ]
    alone = load(folder / "model")
    for options in ways:
        steered, free = (own(PROMPT, ip_adapter_scale=scale, **options, **small).images for scale in (1.0, 0.0))
        plain = alone(PROMPT, **options, **{k: v for k, v in small.items() if k != "ip_adapter_image"}).images
        assert np.abs(free.astype(int) - plain).max() <= 1, "a scale of zero is no image prompt"
        assert np.abs(steered.astype(int) - free).max() > 1
    fast = LatentDiffusionPipeline.from_pretrained(folder / "model", device="cpu", speed="max", torch_dtype="float32")
    with_adapters(fast, folder, ["plain"])
    assert np.abs(fast(PROMPT, **SIZE, **small).images.astype(int) - own(PROMPT, **SIZE, **small).images).max() <= 2


def test_saved_without_it(place, pictures, tmp_path):
    """The model's own weights and files are as before."""
    folder, family = place
    if family != "1":
        pytest.skip("saving knows nothing of the family")
    own = ours(folder, ["plain"])
    own(PROMPT, ip_adapter_image=pictures[0], num_inference_steps=1, **SIZE)
    own.save_pretrained(tmp_path / "saved")
    assert not json.loads((tmp_path / "saved" / "unet" / "config.json").read_text()).get("encoder_hid_dim_type")
    again, first = (load(where).components["unet"].state_dict() for where in (tmp_path / "saved", folder / "model"))
    assert again.keys() == first.keys()
    assert all((again[name] == first[name]).all() for name in first)


def test_refusals(place, pictures, tmp_path):
    folder, family = place
    if family != "1":
        pytest.skip("refusals know nothing of the family")
    own = load(folder / "model")
    hub = folder / "hub" / "models"
    with pytest.raises(ConfigError, match="1 image prompts, and no IP-Adapter is loaded"):
        own(PROMPT, ip_adapter_image=pictures[0], **OPTIONS)
    with pytest.raises(ConfigError, match="ip_adapter_scale has 1 values, and no IP-Adapter is loaded"):
        own(PROMPT, ip_adapter_scale=0.5, **OPTIONS)
    with pytest.raises(ModelError, match="no such file"):
        own.load_ip_adapter(hub / "absent.safetensors")
    with pytest.raises(ModelError, match="no such file"):  # then the first is not loaded either
        own.load_ip_adapter([hub / "plain.safetensors", hub / "absent.safetensors"])
    with pytest.raises(ModelError, match=r"no ip_adapter\.safetensors in"):
        own.load_ip_adapter(hub)
    with pytest.raises(ModelError, match="no image encoder in"):
        own.load_ip_adapter(hub / "plain.safetensors", image_encoder_folder="absent")
    with pytest.raises(ModelError, match="no IP-Adapter: its names begin with"):
        weights = folder / "model" / "unet" / "diffusion_pytorch_model.safetensors"
        own.load_ip_adapter(weights, image_encoder_folder=None)
    torch.save({}, tmp_path / "ip_adapter.bin")
    with pytest.raises(UnsafeError, match="pickle"):
        own.load_ip_adapter(tmp_path / "ip_adapter.bin", image_encoder_folder=None)
    save_file(ip_adapters.state(stable_diffusion.pipeline("XL").unet, "plain"), tmp_path / "xl.safetensors")
    with pytest.raises(ModelError, match="layer 0 has"):
        own.load_ip_adapter(tmp_path / "xl.safetensors", image_encoder_folder=None)
    state = ip_adapters.state(own.components["unet"], "plain")
    wrong = {name: t[:, :-8].contiguous() if name == "image_proj.proj.weight" else t for name, t in state.items()}
    save_file(wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(ModelError, match="with its image encoder"):
        own.load_ip_adapter(tmp_path / "wrong.safetensors", image_encoder_folder=hub / "image_encoder")
    with_adapters(own, folder, ["plain"])
    for given, message in (
        (None, "0 image prompts, and 1 IP-Adapters are loaded"),
        ([pictures[0], pictures[1]], "several pictures of one IP-Adapter"),
        ("no picture", "image must be a PIL image"),
        ([[]], "shows 1 to 64 pictures"),
    ):
        with pytest.raises(ConfigError, match=message):
            own(PROMPT, ip_adapter_image=given, **OPTIONS)
    for scale, message in (
        ([0.5, 0.5], "ip_adapter_scale has 2 values, and 1 IP-Adapters are loaded"),
        ({"sideways": 1.0}, "there is no sideways"),
        ({"up": {"block_7": 1.0}}, "there is no up: block_7"),
        ({"down": {"block_0": [1.0, 2.0]}}, "has 1 attentions"),
        ({"up": "much"}, "must be a number"),
        (float("nan"), "ip_adapter_scale"),
        ({"up": float("nan")}, "must be a number up to 10"),
        ({"down": {"block_0": [[1]]}}, "must be a number up to 10"),
        ({"up": 10**400}, "must be a number up to 10"),
        ([{"up": [True]}], "must be a number up to 10"),
        (1e9, "must be a number up to 10"),
    ):
        with pytest.raises(ConfigError, match=message):
            own(PROMPT, ip_adapter_image=pictures[0], ip_adapter_scale=scale, **OPTIONS)
    for masks in (5, [torch.zeros(1, 1, 0, 0)], [torch.full((1, 1, 8, 8), float("nan"))]):
        with pytest.raises(ConfigError, match="ip_adapter_masks must"):
            options = {"ip_adapter_image": pictures[0], "cross_attention_kwargs": {"ip_adapter_masks": masks}}
            own(PROMPT, **options, **OPTIONS)
    for embeds, message in (
        (torch.zeros(2, 1, 49), "do not fit the IP-Adapter"),
        (torch.zeros(2, 0, 48), "must be tensors"),
        (torch.zeros(2, 1, 48, dtype=torch.complex64), "must be tensors"),
    ):
        with pytest.raises(ConfigError, match=message):
            own(PROMPT, ip_adapter_image_embeds=[embeds], **OPTIONS)
    for wrong in ({"subfolder": 5}, {"weight_name": 5}):
        with pytest.raises(ConfigError, match="must be text"):
            own.load_ip_adapter(hub, **wrong)
    whole = {name: t.to(torch.int64) if name == "image_proj.proj.weight" else t for name, t in state.items()}
    save_file(whole, tmp_path / "whole.safetensors")
    with pytest.raises(ModelError, match="floating point of 16 bits"):
        own.load_ip_adapter(tmp_path / "whole.safetensors", image_encoder_folder=None)
    with pytest.raises(ConfigError, match="1 masks for 2 pictures"):
        masks = {"ip_adapter_masks": [[pictures[0]]]}
        own(PROMPT, ip_adapter_image=[pictures[:2]], cross_attention_kwargs=masks, **OPTIONS)


def test_info_knows_it(place, call):
    folder, _ = place
    file = folder / "hub" / "models" / "plain.safetensors"
    code, out, _ = call("info", file)
    assert (code, json.loads(out)["kind"]) == (0, "IP-Adapter")


def test_scales_of_layers():
    names = ["down_blocks.1.attentions.0.a", "down_blocks.1.attentions.1.a", "down_blocks.2.attentions.0.a"]
    names += ["mid_block.attentions.0.a", "up_blocks.0.attentions.0.a"]
    assert layer_scales(names, 0.5) == [0.5] * 5
    assert layer_scales(names, {"down": {"block_1": [0.1, 0.2]}, "mid": 0.3}) == [0.1, 0.2, 0.0, 0.3, 0.0]
    assert layer_scales(names, {"down": 0.4, "up": {"block_0": 0.6}}) == [0.4, 0.4, 0.4, 0.0, 0.6]


def test_from_the_shell_and_again(place, pictures, tmp_path, call):
    """The record names pictures, adapter and encoder; from it the same picture is drawn again."""
    folder, family = place
    if family != "1":
        pytest.skip("the command knows nothing of the family")
    pictures[0].save(tmp_path / "cat.png")
    pictures[1].save(tmp_path / "dog.png")
    file = folder / "hub" / "models" / "plain.safetensors"
    words = ["generate", PROMPT, "-m", folder / "model", "--steps", "2", "-s", "1", "--size", "64x48"]
    view = ["--ip-adapter", file, "--image-prompt", "cat.png:0.5", "--image-prompt", "dog.png"]
    code, _, err = call(*words, *view, "-o", "out.png")
    assert code == 0, err
    own = ours(folder, ["plain"])
    options = {"num_inference_steps": 2, "seed": 1, "output_type": "uint8", "ip_adapter_scale": 0.5, **SIZE}
    expected = own(PROMPT, ip_adapter_image=[pictures[:2]], **options).images[0]
    assert (np.asarray(Image.open(tmp_path / "out.png")) == expected).all()
    record = read_metadata(tmp_path / "out.png")["latentdiff"]
    assert [each["image"] for each in record["image_prompts"][0]["pictures"]] == ["cat.png", "dog.png"]
    assert record["sources"][0]["encoder"] == "image_encoder"
    places = ["--source", file, "--source", file.parent]
    code, _, err = call("reproduce", "out.png", "--model", folder / "model", *places)
    assert code == 0, err
    code, _, err = call("generate", "", *words[2:], *view, "-o", "shown.png")  # the picture alone says what to draw
    assert code == 0, err
    expected = own("", ip_adapter_image=[pictures[:2]], **options).images[0]
    assert (np.asarray(Image.open(tmp_path / "shown.png")) == expected).all()
    for wrong, message in (
        (["--image-prompt", "cat.png"], "--image-prompt and --ip-adapter require each other"),
        (["--ip-adapter", file], "(got 0 pictures, 1 adapters)"),
        ([*view, "--image-prompt", "cat.png:0.9"], "one IP-Adapter has one scale"),
        (["--ip-adapter", file, "--image-prompt", "cat.png:much"], "is not a number"),
    ):
        code, _, err = call(*words, *wrong, "-o", "wrong.png")
        assert code == 2
        assert message in err
