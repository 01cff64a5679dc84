"""Stable Diffusion 1, 2 and XL beside diffusers' own pipelines: the same weights, latents and solver."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from safetensors.torch import load_file, save_file

from latentdiff import LatentDiffusionPipeline
from latentdiff.core.errors import ConfigError, ModelError, UnsafeError
from latentdiff.drawing.reproduce import read_record
from latentdiff.families import FAMILIES
from latentdiff.families.original import save_single_file
from latentdiff.families.single_file import load_single_file, predicts_noise
from latentdiff.formats.folder import folder_hash, weight_files
from latentdiff.networks.conditions import stacked
from latentdiff.networks.encoders.prompt import Prompt, Style

from . import stable_diffusion

PROMPT, NEGATIVE = "a photograph of an astronaut riding a horse", "blurry, ugly"
SOLVERS = {
    "ddim": (DDIMScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {"final_sigmas_type": "zero"}),
}


@pytest.fixture(scope="module", params=stable_diffusion.FAMILIES)
def both(request, folders):
    """Our pipeline and diffusers' of one folder."""
    family = request.param
    kind = StableDiffusionXLPipeline if family == "XL" else StableDiffusionPipeline
    theirs = kind.from_pretrained(folders[family], **({"add_watermarker": False} if family == "XL" else {}))
    theirs.set_progress_bar_config(disable=True)
    return LatentDiffusionPipeline.from_pretrained(folders[family], device="cpu"), theirs, family


def latents(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def largest(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


@torch.no_grad()
def test_networks(both):
    """Text encoder, U-Net and autoencoder by themselves: rounding only, relative to the largest value."""
    ours, theirs, family = both
    alone = ours.model.encoder.encode(Prompt(PROMPT))
    encoded = theirs.encode_prompt(PROMPT, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    assert largest(alone["tokens"], encoded[0][0]) < 1e-6
    x = latents(1, 4, 8, 8)
    added = None
    if family == "XL":
        assert largest(alone["pooled"], encoded[2][0]) < 1e-6
        sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]])
        added = {"text_embeds": encoded[2], "time_ids": sizes}
        alone = alone.joined({"sizes": sizes[0]})
    conditions = stacked([alone])
    expected = theirs.unet(x, 500, encoded[0], added_cond_kwargs=added).sample
    assert largest(ours.model.backbone(x, 500.0, conditions), expected) < 1e-5
    scale = theirs.vae.config.scaling_factor
    assert largest(ours.model.codec.decode(x), theirs.vae.decode(x / scale).sample) < 1e-5


@pytest.mark.parametrize("solver", SOLVERS)
def test_pictures(both, solver):
    """Guided, with a negative prompt: the same picture to rounding.

    8 steps divide the 1000 times: of other numbers diffusers' DDIM takes its steps from other levels than it reached.
    Its Euler starts from sigma times the noise, not sqrt(1 + sigma^2); the latents make up for it.
    """
    ours, theirs, _ = both
    kind, settings = SOLVERS[solver]
    theirs.scheduler = kind.from_config(dict(theirs.scheduler.config) | stable_diffusion.SCHEDULE | settings)
    x = latents(2, 4, 16, 8)
    options = {"height": 128, "width": 64, "num_inference_steps": 8, "guidance_scale": 5.0}
    start = x / ours.model.path.level(999).sigma if solver == "euler" else x
    prompts = {"prompt": [PROMPT] * 2, "negative_prompt": [NEGATIVE] * 2}
    expected = theirs(**prompts, **options, latents=start, output_type="np").images
    canvas = ours(
        PROMPT,
        negative_prompt=NEGATIVE,
        num_images_per_prompt=2,
        latents=x,
        sampler=solver,
        spacing="trailing",
        output_type="np",
        **options,
    ).images
    assert np.abs(canvas - expected).max() < 1e-5
    assert expected.std() > 0.01, "a flat picture shows nothing"


@pytest.mark.slow
def test_xl_of_velocity_and_zero_terminal_snr(tmp_path):
    """NoobAI's like, known by the scheduler's config: the first level has no signal, guidance is rescaled."""
    theirs = stable_diffusion.pipeline("XL", prediction="v_prediction")
    velocity = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    theirs.scheduler = DDIMScheduler(**stable_diffusion.SCHEDULE, **velocity)
    theirs.save_pretrained(tmp_path)
    ours, x = stable_diffusion.load(tmp_path), latents(1, 4, 8, 8)
    first = ours.model.path.levels(8, "trailing")[0]
    assert (ours.model.prediction, first.alpha, first.sigma) == ("v_prediction", 0.0, 1.0)
    options = {"num_inference_steps": 8, "guidance_scale": 5.0, "height": 64, "width": 64, "guidance_rescale": 0.7}
    expected = theirs(PROMPT, latents=x, output_type="np", **options).images
    assert np.abs(ours(PROMPT, latents=x, output_type="np", **options).images - expected).max() < 1e-4


def test_default_negative_prompt(both):
    """Without one, SDXL's unconditional context is zeros, the others' is that of the empty prompt."""
    ours, theirs, _ = both
    kind, settings = SOLVERS["ddim"]
    theirs.scheduler = kind.from_config(dict(theirs.scheduler.config) | stable_diffusion.SCHEDULE | settings)
    x = latents(1, 4, 8, 8)
    options = {"num_inference_steps": 2, "guidance_scale": 5.0, "height": 64, "width": 64}
    expected = theirs(PROMPT, latents=x, output_type="latent", **options).images
    canvas = ours(PROMPT, latents=x, sampler="ddim", spacing="trailing", output_type="latent", **options).images
    assert largest(canvas, expected) < 1e-4


@torch.no_grad()
def test_clip_skip(both):
    """One layer fewer, after the final norm but for SDXL; in the picture too, where the prompt alone skips."""
    ours, theirs, family = both
    context = ours.model.encoder.encode(Prompt(PROMPT, Style(clip_skip=1)))["tokens"]
    ids = [encoder.tokenize([PROMPT]) for encoder in ours.model.encoder.encoders]
    texts = [theirs.text_encoder, getattr(theirs, "text_encoder_2", None)]
    hidden = [text(i, output_hidden_states=True).hidden_states for text, i in zip(texts, ids, strict=False)]
    if family == "XL":
        assert largest(context, torch.cat([states[-3] for states in hidden], -1)[0]) < 1e-6
        encoded = theirs.encode_prompt(PROMPT, device="cpu", clip_skip=1)
        assert largest(context, encoded[0][0]) < 1e-6
    else:
        assert largest(context, theirs.text_encoder.final_layer_norm(hidden[0][-2])[0]) < 1e-6
    options = {"num_inference_steps": 2, "guidance_scale": 5.0, "height": 64, "width": 64, "seed": 1}
    skipped, plain = (ours(PROMPT, output_type="latent", clip_skip=skip, **options).images for skip in (1, None))
    assert largest(skipped, plain) > 1e-3
    with pytest.raises(ConfigError, match="clip_skip must be from 0 to"):
        ours(PROMPT, clip_skip=9, num_inference_steps=1)


@torch.no_grad()
def test_training_reads_as_drawing_does(folders):
    """A batch of token ids under no gradient: the contexts of the prompts one by one, of XL zeros for the empty one."""
    for family, folder in folders.items():
        encoder = LatentDiffusionPipeline.from_pretrained(folder, device="cpu").model.encoder
        read = encoder(encoder.tokenize([PROMPT, ""]))
        for row, prompt in enumerate([PROMPT, ""]):
            alone = encoder.encode(Prompt(prompt))
            torch.testing.assert_close(read["tokens"][row], alone["tokens"], rtol=0, atol=1e-5)
            assert ("pooled" in read.arrays) == ("pooled" in alone.arrays) == (family == "XL")
            if family == "XL":
                torch.testing.assert_close(read["pooled"][row], alone["pooled"], rtol=0, atol=1e-5)
                assert bool(read["tokens"][row].any()) == bool(read["pooled"][row].any()) == bool(prompt)


def test_sdxl_is_told_sizes(folders):
    ours = LatentDiffusionPipeline.from_pretrained(folders["XL"], device="cpu")
    theirs = StableDiffusionXLPipeline.from_pretrained(folders["XL"], add_watermarker=False)
    theirs.set_progress_bar_config(disable=True)
    x = latents(1, 4, 8, 8)
    options = {"num_inference_steps": 2, "guidance_scale": 5.0, "height": 64, "width": 64, "original_size": (512, 320)}
    expected = theirs(PROMPT, latents=x, output_type="latent", crops_coords_top_left=(16, 8), **options).images
    canvas = ours(PROMPT, latents=x, sampler="ddim", spacing="trailing", output_type="latent", crop=(16, 8), **options)
    assert largest(canvas.images, expected) < 1e-4
    with pytest.raises(ConfigError, match="original_size and crop require a model that reads sizes"):
        LatentDiffusionPipeline.from_pretrained(folders["1"], device="cpu")(PROMPT, crop=(1, 1))


def test_own_contexts(both):
    """prompt_embeds and their likes as diffusers makes them."""
    ours, theirs, family = both
    encoded = theirs.encode_prompt(
        PROMPT, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, negative_prompt=NEGATIVE
    )
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    given = {name: tensor for name, tensor in zip(names, encoded, strict=False) if tensor is not None}
    options = {"num_inference_steps": 2, "guidance_scale": 5.0, "height": 64, "width": 64, "seed": 3}
    canvas = ours(**given, output_type="latent", **options)
    expected = ours(PROMPT, negative_prompt=NEGATIVE, output_type="latent", **options).images
    assert largest(canvas.images, expected) < 1e-4
    assert canvas.metadata[0].own_noise
    with pytest.raises(ConfigError, match="give only one of them"):
        ours(PROMPT, **given, **options)
    with pytest.raises(ConfigError, match="require negative_prompt_embeds"):
        part = {name: tensor for name, tensor in given.items() if name == "pooled_prompt_embeds"}
        ours(prompt_embeds=given["prompt_embeds"][:, :70], **part, **options)
    with pytest.raises(ConfigError, match="require prompt_embeds"):
        ours(negative_prompt_embeds=given["negative_prompt_embeds"], **options)
    with pytest.raises(ConfigError, match="a model that reads pooled text requires pooled embeds"):
        ours(**given | {"pooled_prompt_embeds": None if family == "XL" else torch.zeros(1, 8)}, **options)


@pytest.mark.filterwarnings("ignore")
def test_picture_to_picture(folders):
    """StableDiffusionImg2ImgPipeline with the posterior's mean: the same steps, the same latents."""
    ours = LatentDiffusionPipeline.from_pretrained(folders["1"], device="cpu")
    theirs = StableDiffusionImg2ImgPipeline.from_pretrained(folders["1"])
    theirs.set_progress_bar_config(disable=True)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 128, 3), np.uint8))
    noise, steps = latents(1, 4, 8, 16), 10
    theirs.scheduler.set_timesteps(steps)
    known = ours.encode(np.asarray(image)[None])
    from latentdiff.diffusion.process import diffuse

    levels = ours.model.path.levels(steps, "trailing")
    x = diffuse(known, noise, levels[4])
    theirs.prepare_latents = lambda *_, **__: x  # theirs draws the posterior, and noise of its own
    options = {"num_inference_steps": steps, "guidance_scale": 3.0, "strength": 0.65}
    expected = theirs(PROMPT, image=image, output_type="latent", **options).images
    out = ours(PROMPT, image=image, latents=noise, sampler="ddim", spacing="trailing", output_type="latent", **options)
    assert largest(out.images, expected) < 1e-4
    assert out.metadata[0].steps == (6,), "int(10 * 0.65)"


def same_networks(first, second):
    for name in ("backbone", "encoder", "codec"):
        ours, theirs = getattr(first.model, name).state_dict(), getattr(second.model, name).state_dict()
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert torch.equal(tensor, theirs[key]), f"{name}.{key}"


@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16])
def test_weights_of_several_precisions_are_not_rounded(folders, tmp_path, wide):
    """They are loaded in a precision that holds all, whichever comes first in the file."""
    folder = shutil.copytree(folders["1"], tmp_path / "model")
    (file,) = (folder / "unet").glob("*.safetensors")
    stored = {name: tensor.half() for name, tensor in load_file(file).items()}
    stored["conv_out.bias"] = torch.full_like(stored["conv_out.bias"], 1 + 2**-7, dtype=wide)
    save_file(stored, file, {"format": "pt"})
    weights = stable_diffusion.stored(folder).model.backbone.model.state_dict()
    assert all(torch.equal(weights[name], tensor.float()) for name, tensor in stored.items())
    assert weights["conv_in.weight"].dtype == torch.float32


@pytest.mark.quick("dtype1-1", "dtype1-XL")
@pytest.mark.parametrize("family", stable_diffusion.FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_single_file_round_trip(folders, family, dtype, tmp_path):
    """Folder -> file -> folder -> file: the same bits each time, by diffusers' conversion, and the same picture."""
    pipe = stable_diffusion.stored(folders[family]).to(dtype=dtype)
    save_single_file(pipe.model, tmp_path / "model.safetensors")
    read = stable_diffusion.stored(tmp_path / "model.safetensors")
    assert (read.model.backbone.dtype, read.model.prediction) == (dtype, pipe.model.prediction)
    same_networks(pipe, read)
    read.save_pretrained(tmp_path / "folder")
    again = stable_diffusion.stored(tmp_path / "folder")
    assert again.model.backbone.dtype == dtype
    same_networks(pipe, again)
    save_single_file(again.model, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    options = {
        "num_inference_steps": 2,
        "width": 64,
        "height": 64,
        "seed": 1,
        "sampler": "euler",
        "spacing": "trailing",
    }
    sources = (folders[family], tmp_path / "model.safetensors", tmp_path / "folder")
    pictures = [
        LatentDiffusionPipeline.from_pretrained(source, device="cpu", torch_dtype=torch.float32)(
            PROMPT, output_type="uint8", **options
        ).images
        for source in (sources if dtype == torch.float32 else sources[1:])
    ]
    assert all(np.array_equal(picture, pictures[0]) for picture in pictures)


@pytest.mark.quick("1", "XL")
@pytest.mark.parametrize("family", stable_diffusion.FAMILIES)
def test_a_single_file_loads_in_diffusers(folders, family, tmp_path):
    """diffusers reads what we wrote, given the folder's configs: the same U-Net and autoencoder."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    pipe = stable_diffusion.stored(folders[family])
    save_single_file(pipe.model, tmp_path / "model.safetensors")
    for kind, part, own in (
        (UNet2DConditionModel, "unet", pipe.model.backbone),
        (AutoencoderKL, "vae", pipe.model.codec),
    ):
        theirs = kind.from_single_file(str(tmp_path / "model.safetensors"), config=str(folders[family]), subfolder=part)
        for key, tensor in next(own.children()).state_dict().items():
            assert torch.equal(theirs.state_dict()[key], tensor)


def test_inferred_configs_are_the_published_ones(folders, tmp_path):
    for family, folder in folders.items():
        save_single_file(stable_diffusion.stored(folder).model, tmp_path / f"{family}.safetensors")
        result = load_single_file(tmp_path / f"{family}.safetensors")
        assert result.family == FAMILIES[1 + (family == "XL")]
        for part, network in (("unet", result.backbone.model), ("vae", result.codec.vae)):
            config = json.loads((folder / part / "config.json").read_text())
            built = json.loads(network.to_json_string())
            differing = {k for k, v in config.items() if built.get(k) != v and not k.startswith("_")}
            assert differing <= {"sample_size"}, "of which a file says nothing"


@pytest.mark.quick("XL")
@pytest.mark.parametrize("family", ["1", "XL"])
def test_a_single_file_that_says_what_it_predicts(folders, family, tmp_path):
    pipe = stable_diffusion.stored(folders[family])
    path = pipe.model.path.zero_terminal_snr()
    save_single_file(replace(pipe.model, prediction="v_prediction", path=path), tmp_path / "v.safetensors")
    read = stable_diffusion.stored(tmp_path / "v.safetensors")
    assert read.model.prediction == "v_prediction"
    np.testing.assert_array_equal(read.model.path.alphas_cumprod, path.alphas_cumprod)


class GivesBack(torch.nn.Module):
    """A U-Net whose output is a share of its input, and the rest what the text says."""

    def __init__(self, share):
        super().__init__()
        self.share, self.model = share, SimpleNamespace(dtype=torch.float32, config=SimpleNamespace())
        self.model.config.block_out_channels, self.model.config.in_channels = (8, 8, 8, 8), 4

    def forward(self, x, t, conditions):
        assert t == 999
        return self.share * x + (1 - self.share) * torch.randn(x.shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize(("share", "noise"), [(0.95, True), (0.6, True), (0.05, False), (-0.1, False)])
def test_what_stable_diffusion_2_predicts_is_measured(folders, share, noise):
    """A network that gives its input back at the last time predicts noise; one that does not, velocity."""
    encoder = stable_diffusion.stored(folders["2"]).model.encoder
    assert predicts_noise(GivesBack(share), encoder) == noise


def test_stable_diffusion_2_without_a_mark(folders, tmp_path):
    """Random weights follow nothing: velocity, and so 768 pixels."""
    save_single_file(stable_diffusion.stored(folders["2"]).model, tmp_path / "marked.safetensors")
    state = load_file(tmp_path / "marked.safetensors")
    del state["v_pred"]
    save_file(state, tmp_path / "bare.safetensors")
    read = stable_diffusion.stored(tmp_path / "bare.safetensors")
    assert (read.model.prediction, read.model.backbone.model.config.sample_size) == ("v_prediction", 96)


def test_a_trained_network_shows_what_it_predicts(tiny_model):
    """The rule on a network that was trained, if briefly: this one predicts velocity."""
    pipe = stable_diffusion.stored(tiny_model)
    assert not predicts_noise(pipe.model.backbone, pipe.model.encoder)


# what is refused


@pytest.fixture(scope="module")
def single_file(folders, tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "model.safetensors"
    save_single_file(stable_diffusion.stored(folders["1"]).model, path)
    return path


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("model.diffusion_model.", "no U-Net under model.diffusion_model"),
        ("cond_stage_model.", "text encoders of no Stable Diffusion 1, 2 or XL"),
        ("model.diffusion_model.middle_block.1", "cannot load"),
    ],
)
def test_a_file_with_a_part_missing(single_file, tmp_path, prefix, message):
    state = {name: tensor for name, tensor in load_file(single_file).items() if not name.startswith(prefix)}
    save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(ModelError, match=message):
        stable_diffusion.stored(tmp_path / "part.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        "cond_stage_model.transformer.text_model.encoder.layers.1000000.x",
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.10000000.x",
        "model.diffusion_model.input_blocks.99999999.0.x",
        "first_stage_model.encoder.down.0.block.10000000.x",
        "first_stage_model.encoder.down.2000000000.x",
    ],
)
def test_a_name_alone_makes_no_layers(single_file, tmp_path, name):
    save_file(load_file(single_file) | {name: torch.zeros(1)}, tmp_path / "many.safetensors")
    with pytest.raises(ModelError, match="its names are numbered up to"):
        stable_diffusion.stored(tmp_path / "many.safetensors")


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\xff" * 8 + b"{}" * 50])
def test_a_file_that_is_none(tmp_path, content):
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises((ModelError, UnsafeError), match=r"is not a safetensors file|cannot load .*header too large"):
        stable_diffusion.stored(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors", "model.SafeTensors"])
def test_a_pickle_is_refused(tmp_path, name):
    torch.save({"state_dict": {"x": torch.zeros(1)}}, tmp_path / name)
    with pytest.raises(UnsafeError, match="is a pickle file; latentdiff loads safetensors only"):
        stable_diffusion.stored(tmp_path / name)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"_class_name": "PixArtAlphaPipeline"}, ModelError, "PixArtAlphaPipeline is not supported"),
        ({"_class_name": ["pipeline", "Mine"]}, UnsafeError, "asks to run code"),
        ({"text_encoder": ["evil", "CLIPTextModel"]}, UnsafeError, "text_encoder has the unknown class"),
        ({"text_encoder_2": ["transformers", "T5EncoderModel"]}, UnsafeError, "text_encoder_2 has the unknown class"),
        ({"scheduler": ["evil", "DDIMScheduler"]}, UnsafeError, "scheduler has the unknown module evil"),
        ({"safety_checker": ["evil", "Checker"]}, UnsafeError, "safety_checker has the unknown module evil"),
        ({"transformer": ["diffusers", "FluxTransformer2DModel"]}, ModelError, "models with transformer"),
        ({"controlnet": [None, None]}, None, ""),
        ({"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}, None, ""),
    ],
    ids=str,
)
def test_model_index(folders, tmp_path, changes, kind, message):
    folder = shutil.copytree(folders["XL"], tmp_path / "model")
    edit(folder / "model_index.json", **changes)
    if kind is None:
        stable_diffusion.stored(folder)
        return
    with pytest.raises(kind, match=message):
        stable_diffusion.stored(folder)


def test_a_network_of_other_channels(folders, tmp_path):
    """An upscaler's or a depth model's U-Net reads what is not given here."""
    folder = shutil.copytree(folders["1"], tmp_path / "model")
    stable_diffusion.unet("1", tiny=True, in_channels=7).save_pretrained(folder / "unet")
    with pytest.raises(ModelError, match="reads 7 channels does not fit latents of 4"):
        stable_diffusion.stored(folder)


def test_info_of_single_files(single_file, tmp_path, monkeypatch, capsys):
    import sys

    from latentdiff.cli import main

    save_file({"lora_unet_conv_in.lora_down.weight": torch.zeros(2, 3)}, tmp_path / "ink.safetensors")
    result = {}
    for path in (single_file, tmp_path / "ink.safetensors"):
        monkeypatch.setattr(sys, "argv", ["latentdiff", "info", str(path)])
        with pytest.raises(SystemExit):
            main()
        result[path.stem] = json.loads(capsys.readouterr().out)
    assert result["model"]["kind"] == "Stable Diffusion 1, original layout"
    assert result["model"]["metadata"] == {"modelspec.prediction_type": "epsilon"}
    assert (result["ink"]["kind"], result["ink"]["parameters"]) == ("adapter, kohya's names", 6)


# variants and shards


@pytest.mark.slow
def test_variants_and_shards(folders, tmp_path):
    """fp16 beside the plain weights, and weights in pieces: each is what it was saved as."""
    theirs = stable_diffusion.pipeline("1")
    folder = tmp_path / "model"
    theirs.save_pretrained(folder, max_shard_size="300KB")
    assert len(weight_files(folder / "unet")) > 2
    plain = stable_diffusion.stored(folder)
    same_networks(plain, stable_diffusion.stored(folders["1"]))
    theirs.to(torch.float16).save_pretrained(folder, variant="fp16", max_shard_size="300KB")
    half, again = stable_diffusion.stored(folder, variant="fp16"), stable_diffusion.stored(folder)
    assert (half.model.backbone.dtype, again.model.backbone.dtype) == (torch.float16, torch.float32)
    same_networks(again, plain)
    same_networks(half, plain.to(dtype=torch.float16))
    for variant in ("fp16.ema", "fp16-ema"):
        theirs.to(torch.float32).save_pretrained(folder, variant=variant, max_shard_size="300KB")
        named = stable_diffusion.stored(folder, variant=variant)
        same_networks(named, plain)
        picture = tmp_path / f"{variant}.png"
        named("a", seed=1, num_inference_steps=1, height=16, width=16).save(picture)
        assert read_record(picture).variant == variant
    assert folder_hash(folder) != folder_hash(folder, "fp16")
    with pytest.raises(
        ModelError, match=r"no weights of variant bf16 .* There are: fp16, fp16-ema, fp16.ema, the plain one"
    ):
        stable_diffusion.stored(folder, variant="bf16")
    for part in ("unet", "vae", "text_encoder"):
        for file in weight_files(folder / part):
            file.unlink()
        for index in [*(folder / part).glob("*.index.json"), *(folder / part).glob("*fp16?ema*")]:
            index.unlink()
    same_networks(stable_diffusion.stored(folder), half)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_shards_that_leave_the_folder(tmp_path, name):
    folder = tmp_path / "model"
    stable_diffusion.pipeline("1").save_pretrained(folder, max_shard_size="300KB")
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    tree = json.loads(index.read_text())
    tree["weight_map"]["conv_in.bias"] = name
    index.write_text(json.dumps(tree))
    with pytest.raises(UnsafeError, match="names shards outside its folder"):
        stable_diffusion.stored(folder)


def test_a_shard_that_is_not_there(tmp_path):
    folder = tmp_path / "model"
    stable_diffusion.pipeline("1").save_pretrained(folder, max_shard_size="300KB")
    weight_files(folder / "unet")[1].unlink()
    with pytest.raises(ModelError, match="is missing"):
        stable_diffusion.stored(folder)
