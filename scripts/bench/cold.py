"""From shell to picture: `latentdiff generate` beside a diffusers script on the same model folder, in one run.

    python scripts/bench/cold.py [MODEL] [--runs 7]

Both draw one picture with 20 guided steps on the CPU, in processes of their own, in turn. The peer is diffusers'
StableDiffusionPipeline with its DDIM in float32, safetensors only, progress bar off. Printed: wall seconds and peak
memory, medians, and the ratios run by run; before them the first start ever, which compiles the graphs of OpenVINO.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from latentdiff.families.loading import default_model

PROMPT = "a red circle above a blue square"
PEER = """
import sys, torch
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1], use_safetensors=True)
pipe.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(1)
pipe(sys.argv[3], num_inference_steps=20, guidance_scale=3.0, generator=generator).images[0].save(sys.argv[2])
"""


def measure(words: list[str]) -> tuple[float, float]:
    """Wall seconds and peak resident MB of a finished process."""
    began = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(words[:4])} ...")
    return time.perf_counter() - began, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--runtime", default="auto")
    arguments = parser.parse_args()
    ours, theirs, model = [], [], arguments.model or default_model()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LATENTDIFF_CACHE"] = f"{folder}/cache"
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # as installed packages are: compiled once
        for run in range(arguments.runs + 1):  # the first warms the disk's cache
            out = [str(Path(folder) / f"{name}-{run}.png") for name in ("ours", "theirs")]
            words = ["generate", PROMPT, "-m", str(model), "--steps", "20", "--cfg", "3", "-s", "1"]
            words += ["--runtime", arguments.runtime]
            ours.append(measure([sys.executable, "-m", "latentdiff", *words, "--device", "cpu", "-o", out[0]]))
            theirs.append(measure([sys.executable, "-c", PEER, str(model), out[1], PROMPT]))
    for name, figures in (("latentdiff", ours[1:]), ("diffusers", theirs[1:])):
        seconds, memory = (statistics.median(column) for column in zip(*figures, strict=True))
        print(f"{name:<11} {seconds:6.2f} s  {memory:6.0f} MB")
    for column, name in enumerate(("seconds", "memory")):
        ratios = [b[column] / a[column] for a, b in zip(ours[1:], theirs[1:], strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{name}, diffusers / latentdiff: {statistics.median(ratios):.2f} ({spread})")
    print(f"the first start ever: {ours[0][0]:.2f} s  {ours[0][1]:.0f} MB")


if __name__ == "__main__":
    main()
