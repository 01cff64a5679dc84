"""Scheduler configs of diffusers: each class with its own defaults draws what diffusers draws, or a note says why."""

import json
import shutil
from dataclasses import replace

import diffusers
import pytest
import torch

from latentdiff import LatentDiffusionPipeline
from latentdiff.core.errors import ModelError
from latentdiff.diffusion.path import VariancePreserving
from latentdiff.families.sampling import sampling_of
from latentdiff.families.scheduler import read_scheduler

from . import stable_diffusion

SD = VariancePreserving.scaled_linear()
CLASSES = (
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
)
EXACT = {"clip_sample": False, "set_alpha_to_one": True, "skip_prk_steps": True, "steps_offset": 1}


def folder_with(folders, tmp_path, config):
    """A tiny Stable Diffusion whose scheduler has this config."""
    folder = shutil.copytree(folders["1"], tmp_path / "sd", dirs_exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", config["_class_name"]]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def config_of(name, **changes):
    """A config as people write it: the schedule, and no key that the class has a default for."""
    schedule = {key: stable_diffusion.SCHEDULE[key] for key in ("beta_schedule", "beta_start", "beta_end")}
    return {"_class_name": name, **schedule, **changes}


@pytest.fixture(scope="module")
def both(folders):
    """Our pipeline and diffusers', of the same folder."""
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folders["1"], safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    return LatentDiffusionPipeline.from_pretrained(folders["1"], device="cpu"), theirs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spacing", [None, "leading", "linspace", "trailing"])
@pytest.mark.parametrize("name", CLASSES)
def test_as_diffusers_draws(name, spacing, both):
    """The latents are equal to rounding. DEIS of diffusers ends above CLEAN, with 3 % of noise left."""
    ours, theirs = both
    kind = getattr(diffusers, name)
    own = EXACT | ({} if spacing is None else {"timestep_spacing": spacing})
    config = config_of(name, **{key: value for key, value in own.items() if key in kind().config})
    sampling = sampling_of(config)
    theirs.scheduler = kind.from_config(config)
    if (name, spacing) in (("DDIMScheduler", "linspace"), ("PNDMScheduler", "linspace")):
        assert sampling.notes == ("timestep_spacing=linspace",)  # they step from other times than they reached
        return
    assert not sampling.notes
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs.scheduler.set_timesteps(4)
    first = ours.model.path.levels(4, sampling.settings["spacing"])[0]
    # theirs is in x / alpha for solvers of sigmas, some of which start from sigma / alpha instead of 1 / alpha
    scale = float(theirs.scheduler.init_noise_sigma)
    start = noise * (scale * first.alpha if scale > 1.01 else 1.0)
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent", "height": 64, "width": 64}
    expected = theirs("a cat", latents=noise, **settings).images
    picture = ours("a cat", latents=start, **sampling.settings, **settings).images
    apart = float((picture - expected).abs().max() / expected.abs().max())
    assert apart < (6e-3 if name == "DEISMultistepScheduler" else 3e-6)


@pytest.mark.filterwarnings("ignore")
def test_every_class_has_its_own_default():
    """Its spacing, where the config states none."""
    for name in CLASSES:
        stated = sampling_of(config_of(name, timestep_spacing=getattr(diffusers, name)().config.timestep_spacing))
        assert sampling_of(config_of(name)).settings == stated.settings


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 8, 20, 50])
def test_times_of_distilled_models(name, steps):
    scheduler = getattr(diffusers, name)(beta_schedule="scaled_linear", timestep_spacing="leading")
    scheduler.set_timesteps(steps)
    assert sampling_of({"_class_name": name}).settings["spacing"] == "distilled"
    assert [level.t for level in SD.levels(steps, "distilled")[:-1]] == scheduler.timesteps.tolist()
    assert len({level.t for level in SD.levels(70, "distilled")}) == 71


@pytest.mark.parametrize("steps", [3, 10, 20])
@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_times_of_multistep_solvers(spacing, steps):
    scheduler = diffusers.DPMSolverMultistepScheduler(timestep_spacing=spacing, steps_offset=1)
    scheduler.set_timesteps(steps)
    assert [level.t for level in SD.levels(steps, f"{spacing}_open")[:-1]] == scheduler.timesteps.tolist()


@pytest.mark.parametrize(
    ("name", "changes", "notes"),
    [
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, ("solver_order=3",)),
        ("DPMSolverMultistepScheduler", {"solver_order": 1}, ()),
        ("UniPCMultistepScheduler", {"solver_order": 1}, ("solver_order=1",)),
        ("DPMSolverMultistepScheduler", {"solver_type": "heun"}, ("solver_type=heun",)),
        ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}, ("final_sigmas_type=sigma_min",)),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}, ("algorithm_type=dpmsolver",)),
        ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}, ("use_lu_lambdas=True",)),
        ("EulerDiscreteScheduler", {"use_beta_sigmas": True}, ("use_beta_sigmas=True",)),
        ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -1.0}, ("lambda_min_clipped=-1.0",)),
        (
            "EulerDiscreteScheduler",
            {"use_karras_sigmas": True, "timestep_spacing": "trailing"},
            ("use_karras_sigmas with timestep_spacing=trailing",),
        ),
        ("EulerDiscreteScheduler", {"use_exponential_sigmas": True}, ()),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, ()),
        ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}, ("interpolation_type=log_linear",)),
        ("DDIMScheduler", {"clip_sample": True, "steps_offset": 1}, ("clip_sample=True",)),
        ("DDIMScheduler", {"steps_offset": 2}, ("steps_offset=2",)),
        ("DDIMScheduler", {"thresholding": True, "steps_offset": 1}, ("thresholding=True",)),
        ("PNDMScheduler", {"steps_offset": 1}, ("skip_prk_steps=False",)),
        ("LCMScheduler", {"original_inference_steps": 100}, ("original_inference_steps=100",)),
        ("UniPCMultistepScheduler", {"solver_type": "bh1"}, ("solver_type=bh1",)),
        ("DPMSolverSinglestepScheduler", {}, ("DPMSolverSinglestepScheduler",)),
        ("SASolverScheduler", {"steps_offset": 1}, ("SASolverScheduler",)),
    ],
)
def test_what_is_not_taken_is_named(name, changes, notes, folders, tmp_path):
    assert read_scheduler(folder_with(folders, tmp_path, config_of(name, **changes))).notes == notes


def test_a_multistep_solver_of_order_1_is_ddim():
    config = config_of("DPMSolverMultistepScheduler", solver_order=1)
    assert sampling_of(config).settings == {"sampler": "ddim", "spacing": "linspace_open"}


def test_a_flow_without_its_levels_is_refused(folders, tmp_path):
    config = config_of("UniPCMultistepScheduler", prediction_type="flow_prediction")
    with pytest.raises(ModelError, match="json: prediction_type flow_prediction requires use_flow_sigmas"):
        read_scheduler(folder_with(folders, tmp_path, config))


def test_the_note_is_one_warning(command, folders, tmp_path):
    folder = folder_with(
        folders, tmp_path, config_of("DPMSolverMultistepScheduler", solver_order=3, solver_type="heun")
    )
    words = ("generate", "a", "-m", folder, "--steps", "1", "-W", 64, "-H", 64, "-o", "a.png")
    err = command(*words, cwd=tmp_path).stderr
    warning = "warning: the model's scheduler has solver_order=3, solver_type=heun, which this package "
    warning += "does not support: pictures differ from diffusers'"
    assert [line for line in err.splitlines() if line.startswith("warning")] == [warning]


@pytest.mark.parametrize("sampler", [None, "dpmpp_2m"])
def test_a_model_without_recommended_spacing_is_saved_as_it_draws(tiny_model, tmp_path, sampler):
    """On trailing times, which is the default of a request."""
    pipe = LatentDiffusionPipeline.from_pretrained(tiny_model, device="cpu", runtime="torch")
    defaults = {"num_inference_steps": 3} | ({"sampler": sampler} if sampler else {})
    pipe = LatentDiffusionPipeline(replace(pipe.model, card=replace(pipe.model.card, defaults=defaults)))
    before = pipe("a red circle", seed=1, output_type="latent").images
    pipe.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "scheduler" / "scheduler_config.json").read_text())
    assert config["timestep_spacing"] == "trailing"
    saved = LatentDiffusionPipeline.from_pretrained(tmp_path / "saved", device="cpu", runtime="torch")
    assert torch.equal(saved("a red circle", seed=1, output_type="latent").images, before)
