"""What faster ways of drawing cost: composition, distance to the exact picture and time, same prompts and seeds.

    python scripts/bench/lossy.py [--pictures 100] [--tiny MODEL] [--only unipc]

Runtimes and precisions first, which change rounding alone, then fewer steps, deep features used again, guidance in an
interval, a tiny VAE (`--tiny`: a model that has one, exported). Each is drawn beside the plain pictures in turn,
category by category; the time is of whole batches of 32.
"""

import argparse
import time

import numpy as np

from latentdiff import LatentDiffusionPipeline
from latentdiff.data import scenes
from latentdiff.evaluation.benchmark import of_shapes
from latentdiff.evaluation.composition import evaluate_composition

RUNTIMES = {
    "openvino, float32": {"runtime": "openvino", "torch_dtype": "float32"},
    "torch, float32": {"runtime": "torch", "device": "cpu"},
    "torch, max (bfloat16, compiled)": {"runtime": "torch", "device": "cpu", "speed": "max"},
}
SETTINGS = {
    "10 steps": {"num_inference_steps": 10},
    "unipc, 8 steps": {"sampler": "unipc", "num_inference_steps": 8},
    "unipc, 6 steps": {"sampler": "unipc", "num_inference_steps": 6},
    "dpmpp_2m, 8 steps": {"sampler": "dpmpp_2m", "num_inference_steps": 8},
    "dpmpp_2m, 6 steps": {"sampler": "dpmpp_2m", "num_inference_steps": 6},
    "cache_interval 2": {"cache_interval": 2},
    "cache_interval 3": {"cache_interval": 3},
    "guidance_interval [-3, 1]": {"guidance_interval": (-3.0, 1.0)},
    "unipc, 8 steps, cache_interval 2": {"sampler": "unipc", "num_inference_steps": 8, "cache_interval": 2},
}


def scored(pipe, pictures, **settings):
    """Composition, and the seconds it took."""
    pipe(["a red circle"] * 32, num_inference_steps=2, batch_size=32, seed=0, output_type="uint8")
    began = time.perf_counter()
    score = evaluate_composition(pipe.painter, of_shapes(pipe.card), pictures=pictures, seed=1, **settings)
    return score, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=100, help="a category, four a prompt")
    parser.add_argument("--tiny", metavar="MODEL", help="the default model with a tiny VAE, and graphs")
    parser.add_argument("--only", default="", help="ways whose names hold this")
    arguments = parser.parse_args()
    pictures = arguments.pictures
    plain = LatentDiffusionPipeline.from_pretrained("scenes-64", runtime="openvino")
    ways = {name: (LatentDiffusionPipeline.from_pretrained("scenes-64", **made), {}) for name, made in RUNTIMES.items()}
    ways |= {name: (plain, settings) for name, settings in SETTINGS.items()}
    if arguments.tiny:
        ways["tiny VAE"] = (LatentDiffusionPipeline.from_pretrained(arguments.tiny, runtime="openvino"), {})
        few = {"sampler": "unipc", "num_inference_steps": 8}
        ways["tiny VAE, unipc, 8 steps"] = (ways["tiny VAE"][0], few)
    base, seconds = scored(plain, pictures)
    score = f"{base.overall:.3f} +- {base.error:.3f}"
    print(f"openvino, {plain.model.dtype}, 20 DDIM steps: {score}, {seconds:.1f} s")
    for name, (pipe, settings) in ((name, way) for name, way in ways.items() if arguments.only in name):
        _, beside = scored(plain, pictures)
        score, took = scored(pipe, pictures, **settings)
        apart = [np.abs(score.pictures[c].astype(int) - base.pictures[c]).mean() for c in scenes.CATEGORIES]
        print(
            f"{name:<34} composition {score.overall:.3f} +- {score.error:.3f}  "
            f"{np.mean(apart):6.2f} of 255 from it  {took / beside:.2f} times as long",
            flush=True,
        )


if __name__ == "__main__":
    main()
