"""What each guidance does to a model's pictures of shapes: CLIP's score, and what the oracle reads in them.

The CLIP is the model's own, so its score may rise by what only CLIP sees; the oracle does not use it.

    python scripts/bench/guidance.py --pictures 200 --set clip_guidance_scale=1
"""

import argparse
import time

import numpy as np
import torch

from latentdiff import LatentDiffusionPipeline
from latentdiff.data.scenes import CATEGORIES
from latentdiff.evaluation.benchmark import Benchmark, of_shapes
from latentdiff.evaluation.composition import evaluation_scenes
from latentdiff.settings.config import parsed_override


def chosen_scenes(benchmark: Benchmark, count: int, seed: int) -> list:
    """As many of each category."""
    each = -(-count // len(CATEGORIES))
    kinds = [evaluation_scenes(category, each, seed, benchmark=benchmark) for category in CATEGORIES]
    return [scene for scenes in kinds for scene in scenes][:count]


def measure(pipe: LatentDiffusionPipeline, chosen: list, seed: int, **settings: object) -> dict[str, float]:
    """CLIP's cosine with its error over pictures, the share read right with its own, seconds a picture."""
    start, benchmark = time.perf_counter(), of_shapes(pipe.card)
    prompts = [benchmark.prompt(scene) for scene in chosen]
    images = 2 * pipe(prompts, seed=seed, output_type="pt", batch_size=25, **settings).images - 1
    seconds = time.perf_counter() - start
    scores = torch.cat([pipe.painter.scorer.score([p], i[None]) for p, i in zip(prompts, images, strict=True)]).numpy()
    pictures = ((images.permute(0, 2, 3, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
    right = [benchmark.is_right(*pair) for pair in zip(pictures, chosen, strict=True)]
    root = np.sqrt(len(chosen))
    return {
        "clip": scores.mean(),
        "clip error": scores.std(ddof=1) / root,
        "right": np.mean(right),
        "right error": np.std(right, ddof=1) / root,
        "seconds": seconds / len(chosen),
        "scores": scores,
    }


def main() -> None:
    """Plain, then each setting, on the same prompts and seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model")
    parser.add_argument("--weaker")
    parser.add_argument("--set", dest="settings", nargs="+", action="append", default=[], metavar="NAME=VALUE")
    options = parser.parse_args()
    pipe = LatentDiffusionPipeline.from_pretrained(options.model)
    pipe.load_clip()
    if options.weaker:
        pipe.load_weaker(options.weaker)
    chosen = chosen_scenes(of_shapes(pipe.card), options.pictures, options.seed)
    plain = measure(pipe, chosen, options.seed)
    print(f"{'':40} CLIP score         gain, paired        read right      s/picture")
    for words in [[], *options.settings]:
        result = measure(pipe, chosen, options.seed, **dict(map(parsed_override, words))) if words else plain
        gain = result["scores"] - plain["scores"]
        print(
            f"{' '.join(words) or 'as recommended':40} {result['clip']:.4f} ± {result['clip error']:.4f}"
            f"   {gain.mean():+.4f} ± {gain.std(ddof=1) / len(gain) ** 0.5:.4f}"
            f"   {result['right']:.3f} ± {result['right error']:.3f}   {result['seconds']:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
