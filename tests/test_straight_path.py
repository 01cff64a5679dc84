"""A model trained from nothing on a straight path, by the command line, as diffusers' flow-matching models are."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from latentdiff import LatentDiffusionPipeline
from latentdiff.core.errors import ConfigError
from latentdiff.diffusion.path import Straight
from latentdiff.settings.config import load_config

from .conftest import ROOT
from .forked import train

CONFIG = ROOT / "configs" / "scenes-tiny.toml"
PROMPT = "a red circle above a blue square"
STRAIGHT = (
    *('denoiser.path="straight"', 'denoiser.prediction="flow"', "denoiser.shift=2.0", 'denoiser.times="logit_normal"'),
    "denoiser.schedule.zero_terminal_snr=false",
    *('recommended.sampler="euler"', 'recommended.spacing="trailing"'),
    *("denoiser.training.max_train_steps=40", "denoiser.training.gradient_accumulation_steps=1"),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    run = tmp_path_factory.mktemp("straight")
    code, err = train(run, changes=STRAIGHT).ended()
    assert code == 0, err
    return run / "model"


def test_it_is_a_model_of_a_straight_path(model):
    pipe = LatentDiffusionPipeline.from_pretrained(model, device="cpu")
    assert (pipe.model.path, pipe.model.prediction) == (Straight(2.0, T=1000), "flow")
    index = json.loads((model / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DPMSolverMultistepScheduler"], "of order 1, which is Euler's method"
    config = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
    assert [config[key] for key in ("use_flow_sigmas", "flow_shift", "solver_order")] == [True, 2.0, 1]
    without_card = shutil.copytree(model, model.parent / "without-card")
    (without_card / "latentdiff.json").unlink()
    again = LatentDiffusionPipeline.from_pretrained(without_card, device="cpu")
    assert (again.model.path, again.model.prediction, again.card.notes) == (pipe.model.path, "flow", ())
    assert (again.card.defaults["sampler"], again.card.defaults["spacing"]) == ("ddim", "trailing")


@pytest.mark.parametrize(("sampler", "most"), [("euler", 0.01), ("dpmpp_2m", 0.02), ("unipc", 0.02)])
def test_diffusers_draws_it(model, tmp_path, sampler, most):
    """By the pipeline that its model_index names. Its times are whole numbers, and its grid ends at T / 1000."""
    pipe = LatentDiffusionPipeline.from_pretrained(model, device="cpu")
    pipe.card.defaults["sampler"] = sampler
    pipe.save_pretrained(tmp_path / "saved")
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "saved")
    theirs.set_progress_bar_config(disable=True)
    x = torch.randn(1, *pipe.model.codec.shape(pipe.card.size), generator=torch.Generator().manual_seed(0))
    options = {"num_inference_steps": 10, "guidance_scale": 3.0, "output_type": "np"}
    ours = pipe(PROMPT, latents=x, sampler=sampler, spacing="trailing", **options).images
    assert np.abs(ours - theirs(PROMPT, latents=x, **options).images).max() < most


def test_it_learns(model):
    """The loss falls from that of a network that says nothing."""
    lines = [json.loads(line) for line in (model.parent / "denoiser" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert np.mean(losses[-5:]) < 0.9 * losses[0]


@torch.no_grad()
def test_diffusers_scheduler_steps_as_euler_does(model):
    """The same network under diffusers' own scheduler, loaded from the folder: the same latents."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe = LatentDiffusionPipeline.from_pretrained(model, device="cpu")
    x = torch.randn(1, *pipe.model.codec.shape(pipe.card.size), generator=torch.Generator().manual_seed(0))
    options = {"num_inference_steps": 6, "sampler": "euler", "spacing": "trailing", "guidance_scale": 1.0}
    ours = pipe(PROMPT, latents=x, output_type="latent", **options).images
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    times = np.linspace(1000, 0, 7)[:-1] / 1000
    scheduler.set_timesteps(sigmas=times)
    backbone = pipe.model.backbone
    from latentdiff.networks.conditions import stacked
    from latentdiff.networks.encoders.prompt import Prompt

    conditions = stacked([pipe.model.encoder.encode(Prompt(PROMPT))])
    for t in scheduler.timesteps:
        x = scheduler.step(backbone.predict(x, float(t), conditions), t, x).prev_sample
    torch.testing.assert_close(ours, x, rtol=1e-3, atol=1e-3)


def test_predictions_that_a_path_does_not_have():
    with pytest.raises(ConfigError, match="prediction"):
        load_config(CONFIG, ('denoiser.path="straight"', 'denoiser.prediction="v_prediction"'))
