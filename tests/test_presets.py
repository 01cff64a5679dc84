"""Presets of distilled models: their levels, and what wins over what."""

import json

import diffusers
import numpy as np
import pytest

from latentdiff.core.errors import ConfigError
from latentdiff.diffusion.path import Straight, VariancePreserving
from latentdiff.diffusion.samplers import SAMPLERS
from latentdiff.drawing.presets import PRESETS, settled
from latentdiff.drawing.record import read_metadata

LEVELS = {  # the times that each was distilled on, at its own number of steps and at others
    "lcm": {1: [999], 2: [999, 499], 4: [999, 759, 499, 259]},
    "turbo": {1: [999], 4: [999, 749, 499, 249]},
    "lightning": {2: [999, 499], 4: [999, 749, 499, 249], 8: [999, 874, 749, 624, 499, 374, 249, 124]},
    "hyper": {1: [999], 4: [999, 749, 499, 249]},
    "tcd": {4: [999, 759, 499, 259]},
    "dmd2": {4: [999, 749, 499, 249]},
    "mean-flow": {1: [1000], 2: [1000, 500], 4: [1000, 750, 500, 250]},
}


@pytest.mark.parametrize("name", PRESETS)
def test_levels(name):
    path = Straight() if name == "mean-flow" else VariancePreserving.scaled_linear()
    for steps, times in LEVELS[name].items():
        levels = path.levels(steps, PRESETS[name]["spacing"])
        assert [round(level.t) for level in levels[:-1]] == times


@pytest.mark.parametrize("name", PRESETS)
def test_times_are_those_of_diffusers(name):
    """Of the scheduler that each one's authors name."""
    kinds = {"lcm": "LCMScheduler", "tcd": "TCDScheduler", "turbo": "EulerAncestralDiscreteScheduler"}
    kind = kinds.get(name, "EulerDiscreteScheduler" if name == "lightning" else "DDIMScheduler")
    settings = {"timestep_spacing": "trailing"} if kind not in ("LCMScheduler", "TCDScheduler") else {}
    theirs = getattr(diffusers, kind)(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **settings)
    theirs.set_timesteps(4)
    levels = VariancePreserving.scaled_linear().levels(4, PRESETS[name]["spacing"])
    np.testing.assert_allclose([level.t for level in levels[:-1]], np.asarray(theirs.timesteps, float), atol=0.5)
    assert PRESETS[name]["sampler"] in SAMPLERS


def test_what_wins():
    """What is given, then the preset, then the model's defaults."""
    made = settled({"sampler": "ddim", "clip_skip": 1}, {"preset": "dmd2", "num_inference_steps": 3})
    assert made == {
        "sampler": "lcm", "spacing": "trailing", "num_inference_steps": 3, "guidance_scale": 1.0, "clip_skip": 1,
    }  # fmt: skip
    assert settled({"sampler": "ddim"}, {"eta": 1}) == {"sampler": "ddim", "eta": 1}
    assert settled({"guidance_scale": 3.5}, {"preset": "hyper"}, reads_guidance=True)["guidance_scale"] == 3.5
    assert settled({}, {"preset": "hyper", "guidance_scale": 2.0}, reads_guidance=True)["guidance_scale"] == 2.0
    assert settled({"num_inference_steps": 20}, {"timesteps": [900, 500]}) == {"timesteps": [900, 500]}
    for bad in ("fast", 3, ["lcm"]):
        with pytest.raises(ConfigError, match=r"unknown preset .* one of lcm, turbo"):
            settled({}, {"preset": bad})


def test_by_the_command_line_and_in_python(pipe, tiny_model, call, tmp_path):
    words = ("generate", "a ring", "-m", tiny_model, "-s", 1, "-o", tmp_path / "a.png", "--runtime", "torch")
    assert call(*words, "--preset", "lightning")[0] == 0
    record = read_metadata(tmp_path / "a.png")["latentdiff"]["request"]
    options = json.loads(pipe.request("a ring", seed=1, preset="lightning").model_dump_json())
    assert record == {**options, "seed": 1} | {name: record[name] for name in record.keys() - options.keys()}
    assert (record["sampler"], record["guidance_scale"], record["num_inference_steps"]) == ("euler", 1.0, 4)
    code, _, err = call(*words[:-3], tmp_path / "b.png", "--preset", "fast")
    assert (code, "unknown preset 'fast'; one of" in err) == (2, True), err


def test_by_the_server(served):
    body = {"prompt": "a ring", "seed": 1, "preset": "dmd2", "response_format": "url"}
    name = served.post("/v1/images/generations", body).json()["data"][0]["url"].rpartition("/")[2]
    record = read_metadata(served.studio.folder / name)["latentdiff"]["request"]
    assert (record["sampler"], record["spacing"], record["num_inference_steps"]) == ("lcm", "trailing", 4)
