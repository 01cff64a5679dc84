"""Transformers, T5 and language models by OpenVINO: the same pictures as torch's, with the same samplers."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline

from latentdiff import LatentDiffusionPipeline
from latentdiff.core.errors import ConfigError, ModelError
from latentdiff.families.loading import save_model, stored_model
from latentdiff.networks.encoders.prompt import Style
from latentdiff.runtime import compiling
from latentdiff.runtime import export as exporting
from latentdiff.runtime.device import moved
from latentdiff.runtime.export import export
from latentdiff.runtime.graphs import exported

from . import flow_models, flux, stable_diffusion_3
from .test_openvino import alike

PROMPT = "a red castle by the sea"
SMALL = {"seed": 3, "num_inference_steps": 3, "width": 64, "height": 48, "output_type": "uint8"}
MAKERS = {
    "Stable Diffusion 3": stable_diffusion_3.pipeline,
    "Stable Diffusion 3 without T5": lambda: stable_diffusion_3.pipeline(with_t5=False),
    "Flux.1 dev": flux.pipeline,
    "Flux.1 schnell": lambda: flux.pipeline(dev=False),
    "Kontext": lambda: FluxKontextPipeline(**flux.pipeline().components),
    **{name: lambda name=name: flow_models.pipeline(name) for name in flow_models.MAKERS},
}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name == "Z-Image" else pytest.mark.slow) for name in MAKERS],
)
def folder(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("exported") / request.param
    MAKERS[request.param]().save_pretrained(place)
    differences = export(stored_model(place), place)
    assert max(differences.values()) < 1e-5, "every graph at other sizes than those it was traced with"
    return place


@pytest.fixture(scope="module")
def pipes(folder):
    """The model by OpenVINO in float32, and by torch."""
    load = LatentDiffusionPipeline.from_pretrained
    return load(folder, runtime="openvino", torch_dtype="float32"), load(folder, runtime="torch", device="cpu")


OPTIONS = {
    "plain": {},
    "two prompts of different lengths": {
        "prompt": ["a cat", "a very long description, with windows and a garden and all that one may say, " * 3],
        "num_images_per_prompt": 2,
    },
    "another size, guided": {"width": 96, "height": 80, "guidance_scale": 4.0, "negative_prompt": "blue"},
    "latents": {"output_type": "latent"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_as_torch_draws(pipes, options):
    picture = [pipe(**{"prompt": PROMPT, **SMALL, **options}).images for pipe in pipes]
    if options.get("output_type") == "latent":
        np.testing.assert_allclose(*(np.asarray(each) for each in picture), atol=1e-4)
    else:
        alike(*picture)


def test_from_a_picture(pipes):
    """Kontext reads the picture beside x, by a graph of its own; the others begin from it."""
    rng = np.random.default_rng(0)
    mask = np.zeros((48, 64), np.uint8)
    mask[10:30, 10:40] = 255
    options = {"image": rng.integers(0, 256, (48, 64, 3), np.uint8), "mask_image": mask}
    settings = {name: value for name, value in SMALL.items() if name not in ("width", "height")}
    alike(*(pipe(PROMPT, **options, **settings).images for pipe in pipes))


@pytest.mark.skipif(not compiling.has_bfloat16(), reason="the CPU has no bfloat16")
def test_times_are_exact_in_bfloat16(folder):
    """Angles stay float32: at every time the output is as near as torch's own in bfloat16, a few thousandths."""
    backbone = stored_model(folder).backbone.float().eval()
    traced = next(iter(backbone.traced().values()))
    compiler, inputs = compiling.Compiler(exported(folder), "bfloat16"), dict(traced.inputs[1])
    for time in (3.0, 501.0, 777.0, 999.0):
        inputs["time"] = torch.tensor([time])
        with torch.no_grad():
            expected = traced.reference(**inputs).numpy()
        picture = compiler.run("transformer", {name: array.numpy() for name, array in inputs.items()})[0]
        assert np.abs(picture - expected).max() < 0.02 * np.abs(expected).max(), time


def test_networks_are_as_they_were(folder, monkeypatch, tmp_path):
    """An export converts them in place and back, to the bit; large graphs are checked in bfloat16."""
    place = shutil.copytree(folder, tmp_path / "half")
    model = moved(stored_model(place), dtype=torch.bfloat16)
    save_model(model, place)  # the graphs read the same weights
    before = [{name: tensor.clone() for name, tensor in network.state_dict().items()} for network in model.modules()]
    precisions = []
    monkeypatch.setattr(exporting, "LARGE", 1)
    make = exporting.Compiler
    monkeypatch.setattr(
        exporting, "Compiler", lambda export, precision: make(export, precisions.append(precision) or precision)
    )
    export(model, place)
    assert set(precisions) == {"bfloat16" if compiling.has_bfloat16() else "float32"}
    for network, state in zip(model.modules(), before, strict=True):
        after = network.state_dict()
        assert all(
            tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]) for name, tensor in state.items()
        )


def test_settings_of_the_family(pipes):
    """Steps, guidance and the shift of the path are the same by both runtimes."""
    ours, theirs = (pipe.model for pipe in pipes)
    assert (ours.card.defaults, ours.path, ours.prediction) == (theirs.card.defaults, theirs.path, theirs.prediction)
    assert (ours.backbone.spec, ours.multiple) == (theirs.backbone.spec, theirs.multiple)
    long = "a (red:1.3) cat " * 100
    assert ours.encoder.read(long, Style()) == theirs.encoder.read(long, Style())


def test_a_record_that_lacks_a_fact(folder):
    """What the graphs are is read from a file that anyone can edit."""
    record = folder / "openvino" / "export.json"
    content = record.read_text()
    try:
        for place, key in (("backbone", "graphs"), ("codec", "factor"), ("texts", "text_encoder")):
            tree = json.loads(content)
            del tree[place][key]
            record.write_text(json.dumps(tree))
            with pytest.raises(ModelError, match="an export whose facts were changed"):
                LatentDiffusionPipeline.from_pretrained(folder, runtime="openvino")
    finally:
        record.write_text(content)


def test_clip_skip_is_refused_alike(pipes, folder):
    if "Stable" in folder.name:
        pytest.skip("its CLIPs have layers to skip")
    for pipe in pipes:
        with pytest.raises(ConfigError, match="clip_skip has no effect on this model"):
            pipe(PROMPT, clip_skip=1, **SMALL)
