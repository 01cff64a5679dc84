"""Stable Diffusion 1.5, 2.1 and XL in their exact sizes, random weights, beside diffusers; run with -s for figures.

Pictures are small, so that a CPU draws them; every weight of the published models is used. The folders are in float16,
as they are published, and computed with in float32. Needs 16 GB of memory and of disk.
"""

import gc

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

from latentdiff import LatentDiffusionPipeline
from latentdiff.families.original import save_single_file
from latentdiff.formats.folder import parameter_counts
from latentdiff.networks.encoders.prompt import Prompt

from . import stable_diffusion

PARAMETERS = {  # of the published models
    "1": {"unet": 859_520_964, "text_encoder": 123_060_480, "vae": 83_653_863},
    "2": {"unet": 865_910_724, "text_encoder": 340_387_840, "vae": 83_653_863},
    "XL": {"unet": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840, "vae": 83_653_863},
}
PROMPT, NEGATIVE = "a photograph of an astronaut riding a horse", "blurry, ugly"
SOLVERS = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler, "dpmpp_2m": DPMSolverMultistepScheduler}
SETTINGS = {"num_inference_steps": 4, "guidance_scale": 5.0, "height": 64, "width": 128}
SIGMA = 0.9976672442  # of the last time: diffusers' Euler starts from sigma / alpha, not from 1 / alpha
EXACT = dict(stable_diffusion.SCHEDULE)


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def far(ours, theirs):
    """The largest difference, in parts of the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


@torch.no_grad()
def expected(folder, family):
    """What diffusers' pipeline of the folder computes: the parts, and a picture for each solver."""
    kind = StableDiffusionXLPipeline if family == "XL" else StableDiffusionPipeline
    theirs = kind.from_pretrained(folder, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    result = {}
    encoded = theirs.encode_prompt(PROMPT, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    added = None
    if family == "XL":
        result["pooled"] = encoded[2]
        added = {"text_embeds": encoded[2], "time_ids": torch.tensor([[64.0, 128, 0, 0, 64, 128]])}
    result["context"] = encoded[0]
    result["unet"] = theirs.unet(noise(1, 4, 8, 16), 500, encoded[0], added_cond_kwargs=added).sample
    result["vae"] = theirs.vae.decode(noise(1, 4, 8, 16) / theirs.vae.config.scaling_factor).sample
    for solver, scheduler in SOLVERS.items():
        theirs.scheduler = scheduler.from_config(dict(theirs.scheduler.config) | EXACT)
        start = noise(1, 4, 8, 16) / (SIGMA if solver == "euler" else 1)
        result[solver] = theirs(PROMPT, negative_prompt=NEGATIVE, latents=start, output_type="pt", **SETTINGS).images
    return result


@torch.no_grad()
def computed(source, family):
    """The same by our pipeline."""
    from latentdiff.networks.conditions import stacked

    ours = LatentDiffusionPipeline.from_pretrained(source, device="cpu")
    context = stacked([ours.model.encoder.encode(Prompt(PROMPT))])
    result = {"context": context["tokens"]}
    if family == "XL":
        result["pooled"] = context["pooled"]
        context = context.joined({"sizes": torch.tensor([[64.0, 128, 0, 0, 64, 128]])})
    result["unet"] = ours.model.backbone(noise(1, 4, 8, 16), 500.0, context)
    result["vae"] = ours.model.codec.decode(noise(1, 4, 8, 16))
    for solver in SOLVERS:
        settings = {"latents": noise(1, 4, 8, 16), "sampler": solver, "spacing": "trailing", **SETTINGS}
        result[solver] = ours(PROMPT, negative_prompt=NEGATIVE, output_type="pt", **settings).images
    return result


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", stable_diffusion.FAMILIES)
def test_exact_size(family, tmp_path):
    folder, file = tmp_path / "folder", tmp_path / "model.safetensors"
    stable_diffusion.pipeline(family, tiny=False).to(torch.float16).save_pretrained(folder)
    gc.collect()
    counts = parameter_counts(folder)
    assert {part: count for part, count in counts.items()} == PARAMETERS[family]
    theirs = expected(folder, family)
    gc.collect()
    ours = computed(folder, family)
    gc.collect()
    for part, value in theirs.items():
        print(f"\n{family:>2} {part:<9} largest difference {far(ours[part], value):.1e} of the largest value", end="")
        assert far(ours[part], value) < 2e-5
    save_single_file(stable_diffusion.stored(folder).model, file)
    gc.collect()
    again = computed(file, family)
    same = all(torch.equal(again[part], value) for part, value in ours.items())
    print(f"\n{family:>2} folder -> single file -> picture, bitwise equal: {same}")
    assert same
