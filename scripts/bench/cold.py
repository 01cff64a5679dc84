"""From shell to picture: `latentdiff generate` beside a diffusers script on the same model folder, in one run.

    python scripts/bench/cold.py [MODEL] [--runs 7] [--fast]

Both draw one picture with 20 guided steps on the CPU, in processes of their own, in turn. The peer is diffusers'
StableDiffusionPipeline with its DDIM in float32, safetensors only, progress bar off. Printed: wall seconds and peak
memory, medians, and the ratios run by run; before them the first start ever, which compiles the graphs of OpenVINO.

--fast: two more each turn, in 4 steps without guidance by the model's student: `generate --fast`, and diffusers with
LCMScheduler and the student's file, fused, as its manual has it.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from latentdiff.families.loading import included_model

PROMPT = "a red circle above a blue square"
PEER = """
import sys, torch
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1], use_safetensors=True)
pipe.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(1)
pipe(sys.argv[3], num_inference_steps=20, guidance_scale=3.0, generator=generator).images[0].save(sys.argv[2])
"""

FAST_PEER = """
import sys, torch
from diffusers import LCMScheduler, StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1], use_safetensors=True)
pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
pipe.load_lora_weights(sys.argv[1] + "/few_steps")
pipe.fuse_lora()
pipe.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(1)
pipe(sys.argv[3], num_inference_steps=4, guidance_scale=1.0, generator=generator).images[0].save(sys.argv[2])
"""


def measure(words: list[str]) -> tuple[float, float]:
    """Wall seconds and peak resident MB of a finished process."""
    began = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(words[:4])} ...")
    return time.perf_counter() - began, usage.ru_maxrss / 1024


def commands(model: str, runtime: str, *, fast: bool) -> dict[str, list[str]]:
    """What is measured, by name; each lacks the place of its picture."""
    ours = [sys.executable, "-m", "latentdiff", "generate", PROMPT, "-m", model, "-s", "1", "--device", "cpu"]
    ours += ["--runtime", runtime]
    made = {"latentdiff": [*ours, "--steps", "20", "--cfg", "3"], "diffusers": [sys.executable, "-c", PEER, model]}
    if fast:
        made |= {"latentdiff --fast": [*ours, "--fast"], "diffusers, 4 steps": [sys.executable, "-c", FAST_PEER, model]}
    return made


def say(name: str, one: list[tuple[float, float]], other: list[tuple[float, float]]) -> None:
    """The ratios of two, run by run."""
    for column, what in enumerate(("seconds", "memory")):
        ratios = [b[column] / a[column] for a, b in zip(one[1:], other[1:], strict=True)]
        print(f"{what}, {name}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--runtime", default="auto")
    parser.add_argument("--fast", action="store_true")
    arguments = parser.parse_args()
    model = arguments.model or included_model()
    each = commands(str(model), arguments.runtime, fast=arguments.fast)
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in each}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LATENTDIFF_CACHE"] = f"{folder}/cache"
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # as installed packages are: compiled once
        for run in range(arguments.runs + 1):  # the first warms the disk's cache
            for number, (name, words) in enumerate(each.items()):
                out = str(Path(folder) / f"{number}-{run}.png")
                end = ["-o", out] if name.startswith("latentdiff") else [out, PROMPT]
                figures[name].append(measure([*words, *end]))
    for name, own in figures.items():
        seconds, memory = (statistics.median(column) for column in zip(*own[1:], strict=True))
        print(f"{name:<18} {seconds:6.2f} s  {memory:6.0f} MB; the first time {own[0][0]:6.2f} s  {own[0][1]:6.0f} MB")
    say("diffusers / latentdiff", figures["latentdiff"], figures["diffusers"])
    if arguments.fast:
        say("diffusers, 4 steps / --fast", figures["latentdiff --fast"], figures["diffusers, 4 steps"])
        say("20 guided steps / --fast", figures["latentdiff --fast"], figures["latentdiff"])


if __name__ == "__main__":
    main()
