"""A LoRA taught to an exact-size Stable Diffusion 1.5: memory, file size, and the same picture in diffusers.

Run with -s for figures. Random weights, 64 x 64 pixels, 3 steps of the command line in a process of its own.
"""

import gc
import re
import subprocess
import sys

import pytest
import torch
from diffusers import StableDiffusionPipeline

from latentdiff import LatentDiffusionPipeline

from . import stable_diffusion
from .conftest import ROOT
from .pictures import as_jsonl, some_pictures

SETTINGS = {"num_inference_steps": 2, "guidance_scale": 5.0, "height": 64, "width": 64}
PROMPT = "a photograph of an astronaut riding a horse"


def noise():
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def ours(folder, adapter):
    pipe = LatentDiffusionPipeline.from_pretrained(folder, device="cpu")
    fit = pipe.load_lora_weights(adapter)
    assert (fit.matched, fit.unused, fit.missing) == (128, [], []), "16 transformers of 8 projections"
    return pipe(PROMPT, latents=noise(), output_type="latent", sampler="ddim", spacing="trailing", **SETTINGS).images


def theirs(folder, adapter):
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(adapter.parent, weight_name=adapter.name)
    return pipe(PROMPT, latents=noise(), output_type="latent", **SETTINGS).images


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_lora_of_stable_diffusion(tmp_path, precision):
    folder, out = tmp_path / "sd15", tmp_path / "out"
    made = stable_diffusion.pipeline("1", tiny=False)
    made.to(dtype=torch.float16)
    made.save_pretrained(folder)
    del made
    gc.collect()
    data = as_jsonl(tmp_path / "data", some_pictures(4))
    words = ["finetune", folder, data, "-o", out, "--method", "lora", "--rank", 16, "--kohya", "--steps", 3]
    words += ["--train-batch-size", 1, "--resolution", 64, "--mixed-precision", precision, "--lr", 1e-2]
    words += ["--validation-prompt", "a horse", "--set", "previews.num_inference_steps=1", "--set", "lora.alpha=32.0"]
    command = [sys.executable, "-m", "latentdiff", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    memory = max(float(result) for result in re.findall(r"(\d+\.\d) GB\]?$", done.stderr.replace("\r", "\n"), re.M))
    peft, kohya = out / "pytorch_lora_weights.safetensors", out / "out-kohya.safetensors"
    sizes = [path.stat().st_size / 1e6 for path in (peft, kohya)]
    assert all(size == pytest.approx(4 * 3_188_736 / 1e6, rel=0.01) for size in sizes), "diffusers' rank 4 times four"
    picture = ours(folder, peft)
    apart = float((picture - theirs(folder, peft)).abs().max() / picture.abs().max())
    of_kohya = float((picture - ours(folder, kohya)).abs().max() / picture.abs().max())
    plain = LatentDiffusionPipeline.from_pretrained(folder, device="cpu")
    before = plain(PROMPT, latents=noise(), output_type="latent", sampler="ddim", spacing="trailing", **SETTINGS).images
    moved = float((picture - before).abs().max() / picture.abs().max())
    print(
        f"\nSD 1.5 LoRA rank 16, mixed precision {precision}: {memory:.1f} GB at most, files of "
        f"{sizes[0]:.1f} and {sizes[1]:.1f} MB; in diffusers {apart:.1e} of the largest value apart, in kohya's names "
        f"{of_kohya:.1e}; the three steps moved the picture by {moved:.1e}"
    )
    assert apart < 1e-4
    assert of_kohya < 1e-4
    assert moved > 1e-3
