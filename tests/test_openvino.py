"""Drawing by OpenVINO: equal to torch to rounding, without torch, and with a warning where it cannot."""

import copy
import gzip
import json
import os
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentdiff import LatentDiffusionPipeline
from latentdiff.core import cache as user_cache
from latentdiff.core.errors import ConfigError, ModelError, ResourceError
from latentdiff.families.loading import included_model, stored_model
from latentdiff.networks.conditions import stacked
from latentdiff.networks.encoders.prompt import Prompt
from latentdiff.runtime import compiling, graphs
from latentdiff.runtime.export import export
from latentdiff.runtime.graphs import exported, named

from . import stable_diffusion
from .conftest import ROOT

PROMPT = "a red circle above a blue square"
SCENES = included_model("scenes-64")


def both(folder, **settings):
    """A model by OpenVINO in float32, and by torch."""
    compiled = LatentDiffusionPipeline.from_pretrained(folder, runtime="openvino", torch_dtype="float32", **settings)
    return compiled, LatentDiffusionPipeline.from_pretrained(folder, runtime="torch", device="cpu", **settings)


@pytest.fixture(scope="module")
def default(compiled_model):
    return both(compiled_model)


@pytest.fixture(scope="module")
def families(folders, tmp_path_factory):
    """Each family exported, when it is asked for."""
    made = {}

    def of(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp("exported") / family
            if family == "inpainting":
                stable_diffusion.pipeline("1", inpainting=True).save_pretrained(made[family])
            else:
                shutil.copytree(folders[family], made[family])
            export(stored_model(made[family]), made[family])
        return made[family]

    return of


def alike(ours, theirs, tolerance=1):
    """Pictures, uint8, of which no value differs by more than rounding makes of it."""
    assert ours.shape == theirs.shape
    assert np.abs(ours.astype(int) - theirs).max() <= tolerance


@pytest.fixture(scope="module")
def photo():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 72, 3), np.uint8)
    mask = np.zeros((64, 72), np.uint8)
    mask[10:30, 10:30] = 255
    return pixels, mask


OPTIONS = {
    "plain": {},
    "unguided": {"guidance_scale": 1.0},
    "several": {"num_images_per_prompt": 3, "batch_size": 2},
    "another size": {"width": 92, "height": 36},
    "stochastic": {"sampler": "euler_ancestral", "num_inference_steps": 6},
    "two evaluations": {"sampler": "heun", "num_inference_steps": 4},
    "weights": {"prompt": "a (red:1.4) circle [above] a blue square"},
    "chunks": {"prompt": "a red circle " * 20},
    "a negative prompt": {"negative_prompt": "a blue circle"},
    "clip skip": {"clip_skip": 1},
    "rescaled, thresholded": {"guidance_rescale": 0.7, "threshold": 0.99, "guidance_interval": (-3.0, 3.0)},
    "apg": {"apg": True, "apg_momentum": -0.3, "apg_norm": 5.0},
    "larger": {"hires_scale": 1.5, "num_inference_steps": 6},
    "sliced": {"vae_slicing": True, "num_images_per_prompt": 2},
    "deep features again": {"cache_interval": 2, "num_images_per_prompt": 2},
    "deep features again, unguided": {"cache_interval": 3, "guidance_scale": 1.0},
    "a variation": {"variation_seed": 3, "variation_strength": 0.3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_as_torch_draws(default, options):
    settings = {"prompt": PROMPT, "seed": 7, "num_inference_steps": 5, "output_type": "uint8"} | options
    ours, theirs = (pipe(**settings).images for pipe in default)
    alike(ours, theirs)


@pytest.mark.parametrize("masked", [False, True])
def test_from_a_picture(default, photo, masked):
    """Kept pixels keep their bits."""
    pixels, mask = photo
    settings = {
        "image": pixels,
        "mask_image": mask if masked else None,
        "num_inference_steps": 5,
        "output_type": "uint8",
    }
    ours, theirs = (pipe(PROMPT, seed=7, **settings).images[0] for pipe in default)
    alike(ours, theirs)
    assert not masked or (ours[mask == 0] == pixels[mask == 0]).all()


def test_other_kinds_of_output(default):
    settings = {"seed": 7, "num_inference_steps": 3}
    for kind in ("pt", "latent"):
        ours, theirs = (pipe(PROMPT, output_type=kind, **settings).images for pipe in default)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    noise = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    ours, theirs = (pipe(PROMPT, latents=noise, output_type="uint8", **settings).images for pipe in default)
    alike(ours, theirs)
    encoded = [default[1].model.encoder.encode(Prompt(prompt))["tokens"][None] for prompt in (PROMPT, "")]
    embeds = dict(zip(("prompt_embeds", "negative_prompt_embeds"), encoded, strict=True))
    arrays = {name: tensor.numpy() for name, tensor in embeds.items()}
    alike(
        default[0](**arrays, output_type="uint8", **settings).images,
        default[0](**embeds, output_type="uint8", **settings).images,
        0,
    )
    alike(
        default[0](**embeds, output_type="uint8", **settings).images,
        default[1](PROMPT, output_type="uint8", **settings).images,
    )


def test_steps_can_be_watched(default):
    steps = [list(pipe.stream(PROMPT, seed=1, num_inference_steps=3)) for pipe in default]
    for ours, theirs in zip(*steps, strict=True):
        assert isinstance(ours.x, np.ndarray)
        assert ours.level == theirs.level
        np.testing.assert_allclose(ours.x0, theirs.x0.numpy(), rtol=1e-3, atol=1e-4)
    assert default[0].decode(steps[0][-1].x0).shape == (1, 3, 64, 64)


@pytest.mark.skipif(not compiling.has_bfloat16(), reason="the CPU has no bfloat16")
def test_bfloat16_is_near(compiled_model, default):
    narrow = LatentDiffusionPipeline.from_pretrained(compiled_model, runtime="openvino")
    assert narrow.model.backbone.dtype == "bfloat16"
    ours, theirs = (
        p(PROMPT, seed=7, num_images_per_prompt=4, output_type="uint8").images for p in (narrow, default[1])
    )
    assert 0 < np.abs(ours.astype(int) - theirs).mean() < 2, "of 255"


@pytest.mark.skipif(not compiling.has_bfloat16(), reason="the CPU has no bfloat16")
@pytest.mark.parametrize("height", [9, 16])
def test_narrow_pictures_are_computed_in_float32(compiled_model, default, height):
    """The library's kernels in bfloat16 give NaN or other numbers in each run for latents of one to four columns."""
    narrow = LatentDiffusionPipeline.from_pretrained(compiled_model, runtime="openvino")
    x = np.random.default_rng(0).standard_normal((2, 4, height, 2)).astype(np.float32)
    conditions = stacked([default[0].model.encoder.encode(Prompt(PROMPT))] * 2)
    output, expected = (p.model.backbone.predict(x, 500.0, conditions) for p in (narrow, default[0]))
    assert np.array_equal(output, expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["1", "2", "XL", "inpainting"])
def test_families(families, photo, family):
    """Two text encoders and sizes, nine channels, a scale of latents: all within the graphs."""
    ours, theirs = both(families(family))
    settings = {"seed": 7, "num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "uint8"}
    sizes = {"original_size": (96, 64), "crop": (8, 0)} if family == "XL" else {}
    for options in (
        {"negative_prompt": "blue", "clip_skip": 1, **sizes},
        {"cache_interval": 2},
        {"prompt": "a (red:1.3) circle BREAK two"},
        {"width": 72, "height": 40},  # sides that the levels do not halve evenly
    ):
        options = {"prompt": PROMPT, **settings, **options}
        alike(ours(**options).images, theirs(**options).images, tolerance=2)
    pixels, mask = photo
    options = {"image": pixels, "mask_image": mask, **settings}
    alike(ours(PROMPT, **options).images, theirs(PROMPT, **options).images, tolerance=2)


@pytest.mark.slow
@pytest.mark.skipif(not compiling.has_bfloat16(), reason="the CPU has no bfloat16")
@pytest.mark.parametrize("family", ["1", "2", "XL", "inpainting"])
def test_large_in_bfloat16(families, family):
    """Where kernels are generated, which small pictures and float32 do without."""
    ours = LatentDiffusionPipeline.from_pretrained(families(family), runtime="openvino")
    theirs = LatentDiffusionPipeline.from_pretrained(families(family), runtime="torch", device="cpu")
    settings = {"seed": 7, "num_inference_steps": 4, "output_type": "uint8", "width": 256, "height": 256}
    picture = [pipe(PROMPT, **settings).images.astype(int) for pipe in (ours, theirs)]
    assert np.abs(picture[0] - picture[1]).mean() < 3, "of 255"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_any_precision(compiled_model, default, tmp_path, dtype):
    """The graphs of a model are right for it in another precision, and when it has been trained further."""
    folder = tmp_path / "model"
    shutil.copytree(compiled_model, folder)
    for part in ("unet", "vae", "text_encoder"):
        (file,) = (folder / part).glob("*.safetensors")
        changed = {name: (tensor.float() * 1.01).to(dtype) for name, tensor in load_file(file).items()}
        save_file(changed, file, {"format": "pt"})
    ours, theirs = both(folder)
    images = [p(PROMPT, seed=7, num_inference_steps=5, output_type="uint8").images for p in (ours, theirs, default[1])]
    alike(*images[:2])
    assert np.abs(images[0].astype(int) - images[2]).max() > 1, "other weights draw another picture"


def test_older_names_of_weights(compiled_model, default):
    """Text encoders of older folders have a prefix, their autoencoders other names of attention."""
    weights = {name: name for name in ("text_model.final_layer_norm.weight", "mid_block.attentions.0.query.weight")}
    of = ("vae", compiled_model)
    assert named(weights, "final_layer_norm.weight", *of) == "text_model.final_layer_norm.weight"
    assert named(weights, "mid_block.attentions.0.to_q.weight", *of) == "mid_block.attentions.0.query.weight"
    with pytest.raises(ModelError, match=r"conv_in\.bias is not among the weights of unet \(.*compiled\)"):
        named(weights, "conv_in.bias", "unet", compiled_model)


@pytest.fixture
def cached(compiled_model, tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTDIFF_CACHE", str(tmp_path / "cache"))

    def draw():
        pipe = LatentDiffusionPipeline.from_pretrained(compiled_model, runtime="openvino", torch_dtype="float32")
        return pipe(PROMPT, seed=7, num_inference_steps=2, output_type="uint8").images

    return draw, tmp_path / "cache"


def test_compiled_graphs_are_kept_and_checked(cached, monkeypatch):
    """The second start compiles nothing; what was damaged meanwhile is made again, and the picture is the same."""
    draw, folder = cached
    first = draw()
    kept = {path: path.read_bytes() for path in folder.iterdir()}
    assert len(kept) == 3
    bound = []
    of_part = compiling.Compiler._bound
    monkeypatch.setattr(compiling.Compiler, "_bound", lambda *a: bound.append(a[1]) or of_part(*a))
    assert (draw() == first).all()
    assert not bound
    for damage in (
        lambda b: b[: len(b) // 2],
        lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:],
        lambda b: b"",
        lambda b: b[:3],
    ):
        for path, content in kept.items():
            path.write_bytes(damage(content))
        assert (draw() == first).all()
        assert sorted(bound) == ["text_encoder", "unet", "vae_decoder"]
        assert set(folder.iterdir()) == set(kept)
        assert all(user_cache.kept(path).is_whole() for path in kept), "made anew"
        bound.clear()


def test_nowhere_to_keep_them(cached):
    draw, folder = cached
    folder.write_text("a file is in the way")
    assert draw().shape == (1, 64, 64, 3)
    assert folder.read_text() == "a file is in the way"


def test_the_least_used_are_removed(cached, monkeypatch):
    draw, folder = cached
    draw()
    largest = max(path.stat().st_size for path in folder.iterdir())
    shutil.rmtree(folder)
    monkeypatch.setattr(user_cache, "LIMIT", largest + 1)
    draw()
    assert sum(path.stat().st_size for path in folder.iterdir()) <= largest
    assert draw().shape == (1, 64, 64, 3)


FALLBACKS = {
    "perturbed attention": lambda pipe: pipe.request(PROMPT, pag_scale=2.0),
    "vae_tiling": lambda pipe: pipe.request(PROMPT, vae_tiling=True),
    "guidance by CLIP": lambda pipe: pipe.request(PROMPT, clip_guidance_scale=2.0),
    "an adapter": lambda pipe: pipe.load_lora_weights("lora.safetensors"),
    "a learnt word": lambda pipe: pipe.load_textual_inversion("words.safetensors"),
    "a weaker model": lambda pipe: pipe.load_weaker(pipe.card.folder),
    "components": lambda pipe: pipe.components,
    "moving": lambda pipe: pipe.to(dtype=torch.float64),
}


@pytest.fixture(scope="module")
def small_files(compiled_model, tmp_path_factory):
    """An adapter and a learnt word for the default model."""
    folder, parts = tmp_path_factory.mktemp("files"), stored_model(compiled_model).parts
    name = next(n for n, _ in parts["unet"].named_modules() if n.endswith("attn1.to_q"))
    out, into = parts["unet"].get_submodule(name).weight.shape
    factors = {f"unet.{name}.lora_A.weight": torch.ones(1, into), f"unet.{name}.lora_B.weight": torch.ones(out, 1)}
    save_file(factors, folder / "lora.safetensors")
    width = parts["text_encoder"].get_input_embeddings().weight.shape[1]
    save_file({"<a>": torch.ones(width)}, folder / "words.safetensors")
    return folder


@pytest.mark.parametrize("what", FALLBACKS)
def test_what_only_torch_has(compiled_model, what, small_files, monkeypatch):
    """Torch takes over and says so; where OpenVINO was asked for by name it is an error."""
    monkeypatch.chdir(small_files)
    pipe = LatentDiffusionPipeline.from_pretrained(compiled_model, device="cpu")
    assert pipe.runtime == "openvino"
    with pytest.warns(UserWarning, match=f"^{what} requires torch: drawing with torch instead$"):
        FALLBACKS[what](pipe)
    assert pipe.runtime == "torch"
    with pytest.raises(ConfigError, match=f"{what} requires the torch runtime; openvino was requested by name"):
        FALLBACKS[what](LatentDiffusionPipeline.from_pretrained(compiled_model, runtime="openvino"))


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        (lambda pipe: pipe.load_lora_weights("nowhere"), "no adapter at nowhere"),
        (lambda pipe: pipe.load_lora_weights(None), "a path must be text or a Path"),
        (lambda pipe: pipe.set_adapters("x"), "no adapter 'x' is loaded"),
        (lambda pipe: pipe.load_textual_inversion("nowhere"), "no embeddings at nowhere"),
        (lambda pipe: pipe.load_vae("nowhere"), r"no VAE \(nowhere\)"),
        (lambda pipe: pipe.load_clip("nowhere"), "no CLIP in open_clip's format at nowhere"),
        (lambda pipe: pipe.load_weaker("nowhere"), r"no such model folder \(nowhere\)"),
        (lambda pipe: pipe.to("cuda" if not torch.cuda.is_available() else "nowhere"), "cannot be used here"),
        (lambda pipe: pipe(PROMPT, autoguidance_scale=2.0), "autoguidance_scale requires a weaker model"),
    ],
)
def test_a_change_that_fails_changes_no_runtime(compiled_model, fails, message):
    """Nor does it warn; unloading nothing is no change either."""
    pipe = LatentDiffusionPipeline.from_pretrained(compiled_model, device="cpu")
    before = pipe.painter
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((ConfigError, ModelError), match=message):
            fails(pipe)
        pipe.unload_lora_weights()
    assert pipe.painter is before
    assert pipe.runtime == "openvino"


def test_pictures_say_how_they_were_computed(compiled_model):
    """bfloat16 is not exact."""
    for speed in ("exact", "max"):
        pipe = LatentDiffusionPipeline.from_pretrained(compiled_model, device="cpu", runtime="openvino", speed=speed)
        record = pipe(PROMPT, seed=1, num_inference_steps=1).metadata[0]
        assert record.speed == ("exact" if record.dtype == "float32" else "max")
        assert speed == "max" or record.dtype == "float32"


@pytest.mark.parametrize("runtime", ["auto", "openvino"])
def test_saved_and_still_compiled(compiled_model, tmp_path, runtime):
    pipe = LatentDiffusionPipeline.from_pretrained(compiled_model, device="cpu", runtime=runtime)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.save_pretrained(tmp_path / "model")
        again = LatentDiffusionPipeline.from_pretrained(tmp_path / "model", device="cpu")
    assert (pipe.runtime, again.runtime) == ("openvino", "torch"), "the copy has no export"
    theirs = LatentDiffusionPipeline.from_pretrained(compiled_model, device="cpu", runtime="torch")
    options = {"seed": 1, "num_inference_steps": 2, "output_type": "uint8"}
    alike(*(p(PROMPT, **options).images for p in (theirs, again)), tolerance=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "cuda"}, "is for the CPU, not for cuda"),
        ({"torch_dtype": "float16"}, "computes in float32 or bfloat16, not in float16"),
        ({"path": "nowhere"}, r"no such model folder \(nowhere\)"),
        ({"path": "tests"}, "no model_index.json"),
    ],
)
def test_cannot_be(compiled_model, settings, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((ConfigError, ModelError), match=message):
        LatentDiffusionPipeline.from_pretrained(**{"path": compiled_model, "runtime": "openvino", **settings})


def test_no_export(folders):
    with pytest.raises(
        ModelError, match=f"no export in {folders['1']}. Make one: latentdiff convert {folders['1']} --to"
    ):
        LatentDiffusionPipeline.from_pretrained(folders["1"], runtime="openvino")


def test_an_export_of_another_configuration(compiled_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(compiled_model, folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"norm_eps": 1e-4}))
    message = r"exported before unet/config.json was changed \(.*\). Export it again"
    with pytest.raises(ModelError, match=message):
        LatentDiffusionPipeline.from_pretrained(folder, runtime="openvino")
    with pytest.warns(UserWarning, match="drawing with torch: " + message):
        assert LatentDiffusionPipeline.from_pretrained(folder, device="cpu").runtime == "torch"
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"_diffusers_version": "0.99"}))
    assert exported(folder) is not None, "who wrote it is no matter"


def test_a_small_file_that_unpacks_to_a_large_graph_is_refused(compiled_model, tmp_path, monkeypatch):
    monkeypatch.setattr(graphs, "_LARGEST", 10_000)
    file = Path(shutil.copytree(compiled_model, tmp_path / "model")) / "openvino" / "unet.xml.gz"
    file.write_bytes(gzip.compress(bytes(10_001)))
    with pytest.raises(ModelError, match="a graph of more than"):
        LatentDiffusionPipeline.from_pretrained(tmp_path / "model", runtime="openvino")(PROMPT, num_inference_steps=1)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("export.json", "{}", "an export of format None, not 6 .* Export it again: latentdiff convert"),
        ("export.json", '{"format": 6}', "an export whose facts were changed"),
        ("export.json", '{"format": 6, "configs": {}, "sha256": 1}', "an export whose facts were changed"),
        ("unet.xml.gz", "<net", "cannot load openvino/unet.xml.gz"),
        ("constants.safetensors", "x", "cannot load openvino/"),
        ("text_encoder.xml.gz", None, "an export without text_encoder.xml.gz"),
        ("export.json", None, "an export without export.json"),
        ("unet.xml.gz", None, "an export without unet.xml.gz"),
        ("../tokenizer/tokenizer.json", '{"version": "1.0"', "cannot load .*tokenizer.json"),
        ("../tokenizer/tokenizer.json", "{}", "cannot load .*tokenizer.json"),
    ],
)
def test_damaged_exports(compiled_model, tmp_path, file, content, message):
    folder = tmp_path / "model"
    shutil.copytree(compiled_model, folder)
    (folder / "openvino" / file).unlink()
    if content is not None:
        (folder / "openvino" / file).write_text(content)
    with pytest.raises(ModelError, match=message):
        LatentDiffusionPipeline.from_pretrained(folder, runtime="openvino")(PROMPT, num_inference_steps=1)


@pytest.mark.parametrize("runtime", ["openvino", "torch"])
@pytest.mark.parametrize("reshape", [lambda w: w[:1], lambda w: w.flatten()], ids=["smaller", "flat"])
def test_weights_of_another_shape(compiled_model, tmp_path, runtime, reshape):
    """Nothing is read beyond a tensor's end, nor of one that is too large."""
    folder = tmp_path / "model"
    shutil.copytree(compiled_model, folder)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    name = next(name for name, weight in weights.items() if name.endswith("attn1.to_q.weight"))
    save_file(weights | {name: reshape(weights[name]).contiguous()}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"to_q.weight .*shape .*32, 32|shape .*32, 32"):
        LatentDiffusionPipeline.from_pretrained(folder, runtime=runtime)(PROMPT, num_inference_steps=1)


@pytest.mark.parametrize("runtime", ["openvino", "torch"])
def test_words_that_the_text_encoder_lacks(compiled_model, tmp_path, runtime):
    folder = tmp_path / "model"
    shutil.copytree(compiled_model, folder)
    file = folder / "tokenizer" / "tokenizer.json"
    words = json.loads(file.read_text())
    words["model"]["vocab"]["red</w>"] = 10**6
    file.write_text(json.dumps(words))
    with pytest.raises(ModelError, match="does not fit the text encoder's"):
        LatentDiffusionPipeline.from_pretrained(folder, runtime=runtime)(PROMPT, num_inference_steps=1)


def test_speed_of_the_networks_that_take_over(compiled_model):
    """torch draws as it would have if it had been taken at once."""
    pipe = LatentDiffusionPipeline.from_pretrained(compiled_model, device="cpu", speed="max")
    assert pipe.runtime == "openvino"
    with pytest.warns(UserWarning, match="vae_tiling requires torch"):
        pipe.request(PROMPT, vae_tiling=True)
    assert (pipe.runtime, pipe.painter.model.speed, pipe.model.backbone.dtype) == ("torch", "max", torch.bfloat16)


@pytest.mark.skipif(not compiling.has_bfloat16(), reason="the CPU has no bfloat16")
def test_precision_of_the_networks_that_take_over(compiled_model):
    pipe = LatentDiffusionPipeline.from_pretrained(compiled_model, device="cpu", torch_dtype="bfloat16")
    with pytest.warns(UserWarning, match="vae_tiling"):
        pipe.request(PROMPT, vae_tiling=True)
    assert (pipe.painter.model.speed, pipe.model.backbone.dtype) == ("exact", torch.bfloat16)


def test_another_network_is_another_model(compiled_model, default):
    """A pipeline's model is a value: another network is another pipeline, and this one draws as before."""
    plain = default[1]
    options = {"seed": 3, "num_inference_steps": 2, "output_type": "uint8"}
    before = plain(PROMPT, **options).images
    with pytest.raises(AttributeError, match="has no setter"):
        plain.model = None
    with pytest.raises(FrozenInstanceError):
        plain.model.encoder = None
    silent = LatentDiffusionPipeline.from_pretrained(compiled_model, runtime="torch", device="cpu").model.encoder
    torch.nn.init.zeros_(silent.model.get_input_embeddings().weight)
    other = LatentDiffusionPipeline(replace(plain.model, encoder=silent))
    assert np.abs(other(PROMPT, **options).images.astype(int) - before).mean() > 1
    assert np.array_equal(plain(PROMPT, **options).images, before)


def test_threads_and_copies(default):
    """Callers of one pipeline take turns, and a copy draws the same."""
    pipe = default[0]

    def draw(seed):
        return pipe(PROMPT, seed=seed, num_inference_steps=2, output_type="uint8").images

    expected = [draw(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as threads:
        result = list(threads.map(draw, range(8)))
    assert all(np.array_equal(a, b) for a, b in zip(result, expected, strict=True))
    again = copy.deepcopy(pipe)(PROMPT, seed=0, num_inference_steps=2, output_type="uint8").images
    assert np.array_equal(again, expected[0])


def test_no_home(compiled_model, monkeypatch):
    """Without a home directory there is no cache."""
    for name in ("LATENTDIFF_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def nowhere(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.expanduser", nowhere)
    assert user_cache.file("some.blob") is None
    assert LatentDiffusionPipeline.from_pretrained(compiled_model)(PROMPT, seed=1, num_inference_steps=1).seeds == [1]


def test_memory_ends(compiled_model, monkeypatch):
    monkeypatch.setattr(
        compiling.Compiler, "_bound", lambda *_: (_ for _ in ()).throw(RuntimeError("Failed to allocate 80 bytes"))
    )
    pipe = LatentDiffusionPipeline.from_pretrained(compiled_model, runtime="openvino")
    with pytest.raises(ResourceError, match=r"out of memory\. Draw fewer or smaller pictures"):
        pipe(PROMPT, seed=1, width=80, num_inference_steps=1)


def test_shapes_in_memory(compiled_model, monkeypatch):
    """The oldest goes, and is made again when it is asked for."""
    monkeypatch.setattr(compiling, "SHAPES", 2)
    pipe = LatentDiffusionPipeline.from_pretrained(compiled_model, runtime="openvino", torch_dtype="float32")
    settings = {"seed": 1, "num_inference_steps": 1, "output_type": "uint8"}
    picture = [pipe(PROMPT, width=width, **settings).images for width in (64, 80, 96, 64)]
    assert (picture[0] == picture[3]).all()
    kept = [shapes for part, shapes in pipe.model.backbone.compiler._ready if part == "unet"]
    assert [dict(shapes)["x"][3] for shapes in kept] == [48, 32]


def test_inputs_in_another_memory_order(default):
    """They are copied, and the copies live as long as the graph reads them."""
    compiled, by_torch = (pipe.model.codec for pipe in default)
    images = np.random.default_rng(0).standard_normal((1, 128, 128, 3)).astype(np.float32).transpose(0, 3, 1, 2)
    expected = by_torch.latents_of(torch.from_numpy(images)).numpy()
    for _ in range(3):
        np.testing.assert_allclose(compiled.latents_of(images), expected, atol=1e-4)


def test_large_graphs_in_memory(compiled_model, monkeypatch):
    """Of a graph with gigabytes of weights one compiled version stays."""
    monkeypatch.setattr(compiling, "HEAVY", 1)
    pipe = LatentDiffusionPipeline.from_pretrained(compiled_model, runtime="openvino", torch_dtype="float32")
    for width in (64, 80):
        pipe(PROMPT, seed=1, width=width, num_inference_steps=1)
    kept = [dict(shapes)["x"][3] for part, shapes in pipe.model.backbone.compiler._ready if part == "unet"]
    assert kept == [40]


def test_neither_torch_nor_telemetry(tmp_path):
    """`generate` imports no torch, diffusers or transformers, nor OpenVINO's tools, which report to its makers."""
    code = (
        "import sys\nfrom latentdiff.cli import main\n"
        f"sys.argv = ['latentdiff', 'generate', {PROMPT!r}, '-N', '2', '--device', 'cpu', '--set', 'apg=true']\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'open_clip', 'accelerate', 'scipy', 'openvino.tools.ovc',"
        " 'openvino_telemetry', 'huggingface_hub', 'datasets', 'requests', 'http.client'}\n"
        "print('loaded:', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.endswith("loaded: []\n"), done.stderr
    assert len(list((tmp_path / "outputs").iterdir())) == 2


@pytest.mark.slow
def test_converted_on_the_command_line(call, tmp_path):
    """A model of one's own, in bfloat16, drawn with by both and made again by both."""
    folder = tmp_path / "model"
    assert call("convert", SCENES, "half", "--dtype", "bfloat16")[0] == 0
    shutil.rmtree(tmp_path / "half" / "openvino")
    code, out, err = call("convert", "half", "model", "--to", "openvino")
    assert (code, out) == (0, "model\n")
    assert [line.split(":")[0] for line in err.splitlines()] == [
        "unet",
        "unet_deep",
        "unet_shallow",
        "unet_controlled",
        "unet_prompted",
        "unet_prompted_controlled",
        "text_encoder",
        "vae_decoder",
        "vae_encoder",
    ]
    assert call("convert", "model", "--to", "openvino")[:2] == (0, f"{folder.name}/openvino\n"), "again, in its place"
    for name in ("openvino", "torch"):
        words = ("generate", PROMPT, "-m", "model", "-s", 7, "--steps", 3, "-o", f"{name}.png", "--runtime", name)
        assert call(*words) == (0, f"{name}.png\n", "")
        record = json.loads(call("info", f"{name}.png")[1])["latentdiff"]
        assert record["runtime"] == name
        assert (name in record["versions"], "torch" in record["versions"]) == (True, name == "torch")
        assert call("reproduce", f"{name}.png") == (0, "equal: all 12,288 values\n", "")
    code, out, _ = call("reproduce", "torch.png", "--runtime", "openvino")
    assert (code, out) == (0, "equal: all 12,288 values\n") or (code == 1 and "PSNR" in out)


@pytest.mark.slow
def test_graphs_of_another_network(call, tmp_path, monkeypatch):
    """They are checked before they get their place: of those that fail nothing is left, and older ones stay."""
    monkeypatch.setattr("latentdiff.runtime.export.LARGEST_DIFFERENCE", 0.0)
    shutil.copytree(SCENES, tmp_path / "model")
    before = {file.name: file.read_bytes() for file in (tmp_path / "model" / "openvino").iterdir()}
    code, _, err = call("convert", "model", "--to", "openvino")
    assert code == 4
    assert "cannot export: unet differs by" in err
    assert {file.name: file.read_bytes() for file in (tmp_path / "model" / "openvino").iterdir()} == before
    assert {path.name for path in (tmp_path / "model").iterdir()} == {path.name for path in SCENES.iterdir()}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((SCENES, "--to", "openvino", "--vae", "x"), "--vae requires an output"),
        (("x.safetensors", "--to", "openvino"), "x.safetensors is not a local folder: name an output"),
        ((SCENES, "y.safetensors", "--to", "openvino"), "--to openvino writes a model folder"),
        ((SCENES, "--to", "openvino", "--dtype", "float16"), "--dtype requires an output"),
        ((SCENES,), "name an output: a new folder, or a new .safetensors file"),
    ],
)
def test_what_cannot_be_converted(call, words, message, tmp_path):
    code, _, err = call("convert", *words)
    assert (code, message in err) == (2, True), err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads Linux's table of memory")
def test_a_cached_file_is_dropped_from_memory(tmp_path):
    """Its pages leave the process, and come back when they are read."""
    content = os.urandom(2**24)
    user_cache.keep(tmp_path / "x.blob", content)
    kept = user_cache.kept(tmp_path / "x.blob")
    assert kept.is_whole()

    def mapped():
        lines = Path("/proc/self/smaps").read_text()
        part = lines[lines.index(str(tmp_path / "x.blob")) :]
        return int(part[part.index("Rss:") :].split()[1])

    before = mapped()
    kept.release()
    assert mapped() < before / 10
    assert kept.content.tobytes() == content
