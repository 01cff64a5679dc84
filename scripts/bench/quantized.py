"""What weights of fewer bits cost and save: a Stable Diffusion of exact size, beside openvino-genai.

    python scripts/bench/quantized.py MODEL [--kinds torch torch-int8 ...] [--runs 5] [--size 256] [--steps 4]

MODEL is a folder in diffusers' layout; `--random 1.5` and `--random 3` make one there, in 16 bits, with random weights
of the true shapes (3 is the medium without T5, without rows of openvino-genai). Each kind draws the same prompt from
the same latents and weights, by DDIM or by Euler on a straight path, in a process of its own with all cores, one after
the other. `stored` kinds are folders that `latentdiff convert --quantize` writes. Printed for each: the megabytes
of its weights, the largest memory of the process with loading, the memory in use afterwards, the median seconds of a
picture, and its distance from torch's picture in float32: the norm of the difference over that of the picture without
its mean. `pip install openvino-genai` for its rows.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from peers import Peer
from warm import options_of

sys.path.insert(0, str(Path(__file__).parents[2]))  # before installed packages, of which one is called tests too

KINDS = (
    *("torch", "torch-int8", "torch-fp8", "torch-q8_0", "torch-q4_0", "stored-q8_0", "stored-q4_0"),
    *("openvino", "openvino-int8", "openvino-int4", "genai", "genai-int8", "genai-int4"),
)


def random_model(folder, version):
    """Random weights in 16 bits; the words are those of a small vocabulary."""
    import torch

    from tests import stable_diffusion, stable_diffusion_3

    if version == "3":
        stable_diffusion_3.exact().save_pretrained(folder)
    else:
        stable_diffusion.pipeline("1", tiny=False).to(torch.float16).save_pretrained(folder)
    subprocess.run([sys.executable, "-m", "latentdiff", "convert", str(folder), "--to", "openvino"], check=True)


def stored(model, folder, kind):
    """A folder that `latentdiff convert` writes, whose blocks are read as they are."""
    place = Path(folder) / f"model-{kind}"
    words = ["convert", model, place, "--quantize", kind.removeprefix("stored-")]
    subprocess.run([sys.executable, "-m", "latentdiff", *map(str, words)], check=True, stdout=subprocess.DEVNULL)
    size = sum(file.stat().st_size for file in place.rglob("*") if file.suffix in (".gguf", ".safetensors"))
    print(f"{kind}: {size / 2**20:,.0f} MB on the disk", file=sys.stderr)
    return place


def distance(picture, expected):
    return float(np.linalg.norm(picture - expected) / np.linalg.norm(expected - expected.mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--random", choices=("1.5", "3"), help="make the model first, if it is not there")
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--pictures", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.random and not arguments.model.exists():
        random_model(arguments.model, arguments.random)
    with tempfile.TemporaryDirectory() as folder:
        model, options = options_of(arguments, Path(folder))
        expected = None
        print("| kind | weights, MB | peak, MB | in use, MB | seconds | distance |\n|---|---|---|---|---|---|")
        for kind in arguments.kinds:
            os.environ["LATENTDIFF_CACHE"] = f"{folder}/{kind}"  # its compiled graphs alone
            if kind.startswith("openvino"):
                compiler = Peer(kind, model)
                compiler.draw(**options)  # the first start ever compiles; what is measured are the later ones
                compiler.close()
            peer = Peer("torch", stored(model, folder, kind)) if kind.startswith("stored") else Peer(kind, model)
            answers = [peer.draw(**options) for _ in range(arguments.runs + 1)][1:]  # the first compiles and warms
            peer.close()
            picture = np.load(options["out"])
            expected = picture if expected is None else expected
            seconds = statistics.median(answer["seconds"] for answer in answers)
            last = answers[-1]
            figures = (last["weights"], last["memory"], last["in_use"])
            print(
                f"| {kind} | {' | '.join(f'{each:,.0f}' for each in figures)} | {seconds:.2f} | "
                f"{distance(picture, expected):.4f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
