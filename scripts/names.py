"""How much a model knows of what names look like: its loss under true captions, and under captions with another name.

    python scripts/names.py MODEL emoji/sprites [--scenes 192]

Scenes of one sprite are noised at five levels, with the same noise for every caption. The other name is of a thing of
the same category, style and main colour, so that all else in the caption stays true. Printed is the mean square error
of the velocity at each level, on latents that are the autoencoder's means, and by how much each caption is worse than
the full one, with standard errors over scenes. A model that has learnt no names is as good with the wrong one.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from latentdiff import LatentDiffusionPipeline
from latentdiff.core.images import to_images
from latentdiff.data.sprites.captions import sentence
from latentdiff.data.sprites.description import Describer, Group
from latentdiff.data.sprites.library import Library
from latentdiff.data.sprites.scene import compose, render
from latentdiff.diffusion import noise

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # the share of noise
FLOOR = 0.1  # of the mean posterior variance: channels above it are noise of the autoencoder


def scenes_of(library: Library, count: int, size: int) -> tuple[np.ndarray, dict[str, list[str]]]:
    """Pictures uint8 (N, S, S, 3), and their captions by kind."""
    describer, pictures = Describer(library, 0.0), []
    captions: dict[str, list[str]] = {"full": [], "bare noun": [], "another name": [], "none": []}
    for number in range(count):
        rng = noise.generator(0, "names", number)
        description = describer.describe(rng, "single")
        scene, (group,) = compose(description, rng), description.groups
        assert group.sprite is not None
        alike = (group.sprite.category, group.sprite.style, group.sprite.color)
        others = [s for s in library.sprites if (s.category, s.style, s.color) == alike and s.name != group.name]
        other = others[rng.integers(len(others))] if others else group.sprite
        changed = replace(description, groups=(Group(other, other.name, group.color),))
        pictures.append(render(scene, library, size))
        captions["full"].append(scene.captions[0])
        captions["bare noun"].append(scene.captions[-1])
        captions["another name"].append(sentence(changed, lambda _: True, rng))
        captions["none"].append("")
    return np.stack(pictures), captions


@torch.no_grad()
def losses(pipe: LatentDiffusionPipeline, pictures: np.ndarray, captions: list[str]) -> np.ndarray:
    """Mean square errors of the velocity (N, levels)."""
    posterior = pipe.model.codec.vae.encode(to_images(pictures)).latent_dist
    x0, kept = posterior.mean, posterior.var.mean((0, 2, 3)) < FLOOR
    encoder = pipe.model.encoder
    conditions = encoder(encoder.tokenize(captions))
    results = []
    for level in LEVELS:
        eps = torch.from_numpy(noise.normal(tuple(x0.shape), 0, "names", round(1000 * level)))
        t = torch.full((len(x0),), pipe.model.path.T * level)
        result = pipe.model.backbone((1 - level) * x0 + level * eps, t, conditions)
        results.append((result - (eps - x0))[:, kept].square().mean((1, 2, 3)).numpy())
    return np.stack(results, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("sprites", type=Path)
    parser.add_argument("--scenes", type=int, default=192)
    given = parser.parse_args()
    pipe = LatentDiffusionPipeline.from_pretrained(given.model, runtime="torch", device="cpu")
    pictures, captions = scenes_of(Library(given.sprites), given.scenes, pipe.card.size[0])
    result = {kind: losses(pipe, pictures, texts) for kind, texts in captions.items()}
    print("| caption | " + " | ".join(f"noise {level}" for level in LEVELS) + " |")
    print("|---" * (len(LEVELS) + 1) + "|")
    print("| full | " + " | ".join(f"{value:.4f}" for value in result["full"].mean(0)) + " |")
    for kind in ("bare noun", "another name", "none"):
        worse = result[kind] - result["full"]
        cells = zip(worse.mean(0), worse.std(0, ddof=1) / len(worse) ** 0.5, strict=True)
        print(f"| {kind}: worse by | " + " | ".join(f"{mean:.4f} ± {error:.4f}" for mean, error in cells) + " |")


if __name__ == "__main__":
    main()
