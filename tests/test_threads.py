"""Several threads draw with one pipeline: every picture is, to the bit, what it is when one draws alone."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from latentdiff import LatentDiffusionPipeline
from latentdiff.families import check_folder, loading

PROMPT = "a red circle above a blue square"
WAYS = (  # each changes something of the networks while it draws, which no other may see
    {},
    {"pag_scale": 3.0},
    {"cache_interval": 2},
    {"vae_slicing": True, "num_images_per_prompt": 2},
    {"vae_tiling": True, "width": 96},
    {"guidance_scale": 1.0, "sampler": "unipc"},
    {"image": np.full((64, 64, 3), 99, np.uint8), "strength": 0.7},
    {"prompt": "two pink rings " * 6, "hires_scale": 1.5},
)


@pytest.mark.parametrize("kind", ["torch", pytest.param("XL", marks=pytest.mark.slow), "openvino"])
def test_at_once_is_as_one_after_another(kind, tiny_model, compiled_model, folders):
    folder = {"torch": tiny_model, "XL": folders["XL"], "openvino": compiled_model}[kind]
    runtime = "openvino" if kind == "openvino" else "torch"
    pipe = LatentDiffusionPipeline.from_pretrained(folder, runtime=runtime, device="cpu")
    lacking = {"pag_scale", "vae_tiling"} if kind == "openvino" else set()
    size = {"height": 64, "width": 64} if kind == "XL" else {}
    ways = [way for way in WAYS if not lacking & way.keys()]

    def draw(number):
        way = {"prompt": PROMPT, "seed": number, "num_inference_steps": 4, **size, **ways[number % len(ways)]}
        return pipe(output_type="uint8", **way).images

    alone = [draw(number) for number in range(len(ways))]
    with ThreadPoolExecutor(4) as threads:
        at_once = list(threads.map(draw, range(len(ways))))
    for one, other in zip(alone, at_once, strict=True):
        assert np.array_equal(one, other)


def test_models_are_loaded_one_at_a_time(tiny_model, monkeypatch):
    """transformers changes torch's classes while it makes modules, which another thread's would become."""
    inside, most = [], []

    def counted(load, *words):
        inside.append(words)
        most.append(len(inside))
        time.sleep(0.05)
        model = load(*words)
        inside.pop()
        return model

    def checked(directory):
        family, index = check_folder(directory)
        return replace(family, load=partial(counted, family.load)), index

    monkeypatch.setattr(loading, "check_folder", checked)
    with ThreadPoolExecutor(4) as threads:
        models = list(threads.map(loading.stored_model, [tiny_model] * 4))
    assert most == [1] * 4
    assert all(next(model.backbone.parameters()).device.type == "cpu" for model in models)


def test_a_speed_is_applied_once(tiny_model, monkeypatch):
    """Four threads that ask first get one model."""
    from latentdiff.runtime import speed

    applied, sped_up = [], speed.sped_up
    monkeypatch.setattr(speed, "sped_up", lambda *words: (applied.append(words), sped_up(*words))[1])
    monkeypatch.setattr("torch.nn.Module.compile", lambda *_, **__: None)
    pipe = LatentDiffusionPipeline.from_pretrained(tiny_model, runtime="torch", device="cpu", speed="fast")
    with ThreadPoolExecutor(4) as threads:
        models = list(threads.map(lambda _: pipe.painter.model, range(8)))
    assert len(applied) == 1
    assert all(model is models[0] for model in models)
