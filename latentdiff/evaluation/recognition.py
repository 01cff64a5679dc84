"""Does a judge recognise what a model draws? One picture each of many named things, and of pairs that were held out.

Beside every share stands its ceiling: the judge's verdict on the things' own pictures, as they are and after the
autoencoder. For a name in a style that training never draws, the true picture exists, so its distance from the drawn
one is compared with the distances of the true picture from the other styles of the same name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latentdiff.data.scenes import article
from latentdiff.data.sprites.description import Description, Group
from latentdiff.data.sprites.library import Library, Sprite
from latentdiff.data.sprites.scene import compose, render
from latentdiff.diffusion import noise
from latentdiff.drawing.painter import Painter
from latentdiff.evaluation.benchmark import SpriteBenchmark
from latentdiff.evaluation.judge import Judge
from latentdiff.evaluation.pictures import draw_pictures

MOST_LIKELY = 5


@dataclass(frozen=True)
class Recognition:
    """Pictures of sprites, uint8 (N, H, W, 3), their prompts, and the judge's first names of each."""

    sprites: tuple[Sprite, ...]
    prompts: tuple[str, ...]
    pictures: np.ndarray
    names: list[list[str]]

    def right(self, among: int) -> np.ndarray:
        """Which pictures have their name among so many, float64 (N,)."""
        pairs = zip(self.sprites, self.names, strict=True)
        return np.array([float(sprite.name in names[:among]) for sprite, names in pairs])


def named(judge: Judge, pictures: np.ndarray) -> list[list[str]]:
    """The judge's likeliest names of each whole picture."""
    return judge.best(np.stack([judge.look(picture) for picture in pictures]), MOST_LIKELY)


def chosen(library: Library, count: int, seed: int) -> tuple[Sprite, ...]:
    """A sprite that training draws of each of `count` names, or of all if there are fewer, by a fixed random rule."""
    rng = noise.generator(seed, "recognised names")
    names = sorted(library.by_name)
    sprites: list[Sprite] = []
    for index in rng.permutation(len(names)):
        trained = [sprite for sprite in library.by_name[names[index]] if sprite.row not in library.held_out]
        if trained and len(sprites) < count:
            sprites.append(trained[rng.integers(len(trained))])
    return tuple(sprites)


def prompt_of(sprite: Sprite) -> str:
    """The prompt of one thing in its style: "a red apple, flat style"."""
    style = f", {sprite.style} style" if sprite.style else ""
    return f"{article(sprite.name)} {sprite.name}{style}"


def draw_and_name(
    painter: Painter, benchmark: SpriteBenchmark, sprites: Sequence[Sprite], seed: int, folder: Path, **settings: Any
) -> Recognition:
    """One picture of each sprite's prompt, and its names."""
    prompts = tuple(map(prompt_of, sprites))
    pictures = draw_pictures(painter, prompts, seed=seed, folder=folder, title=folder.name, **settings)
    return Recognition(tuple(sprites), prompts, pictures, named(benchmark.judge, pictures))


def own_pictures(benchmark: SpriteBenchmark, sprites: Sequence[Sprite], seed: int) -> np.ndarray:
    """The sprites themselves as scenes of one thing, uint8 (N, S, S, 3)."""
    scenes = [
        compose(
            Description("single", (Group(sprite, sprite.name, sprite.color),), ("white",)),
            noise.generator(seed, "recognised layout", number),
        )
        for number, sprite in enumerate(sprites)
    ]
    return np.stack([render(scene, benchmark.library, benchmark.size) for scene in scenes])


def style_distances(benchmark: SpriteBenchmark, result: Recognition, seed: int) -> np.ndarray:
    """The distance (N,) of each drawn picture from its true one, over the true one's mean distance from other styles.

    Below 1 the picture is nearer to its style than the styles are to each other. Distances are 1 minus the cosine of
    the judge's features.
    """
    judge, library = benchmark.judge, benchmark.library

    def features(pictures: np.ndarray) -> np.ndarray:
        return judge.features(np.stack([judge.look(picture) for picture in pictures]))

    true, ours = features(own_pictures(benchmark, result.sprites, seed)), features(result.pictures)
    ratios = []
    for sprite, own, our in zip(result.sprites, true, ours, strict=True):
        others = [other for other in library.by_name[sprite.name] if other.style != sprite.style]
        between = 1 - features(own_pictures(benchmark, others, seed)) @ own
        ratios.append((1 - our @ own) / between.mean())
    return np.array(ratios)
