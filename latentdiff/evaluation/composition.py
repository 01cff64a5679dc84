"""Composition in GenEval's form (Ghosh et al. 2023): does a picture show what its prompt states?

There are six categories. A picture counts if the benchmark's reader finds everything in the prompt and nothing else.
The overall score is the unweighted mean of the categories. The ceiling is the score of the scenes' own pictures after
encoding and decoding: no denoiser can be better than its decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentdiff.core.errors import ModelError
from latentdiff.data.scenes import CATEGORIES
from latentdiff.diffusion import noise
from latentdiff.drawing.painter import Painter
from latentdiff.evaluation.benchmark import SHAPES, Benchmark
from latentdiff.evaluation.pictures import draw_pictures, reconstructed
from latentdiff.model import Model

PICTURES_A_PROMPT = 4


@dataclass(frozen=True)
class Score:
    """The share of right pictures among `count`, the share of each prompt, and the standard error over prompts, NaN for
    one prompt.
    """

    mean: float
    error: float
    count: int
    each: tuple[float, ...] = ()


@dataclass(frozen=True)
class Composition:
    """Scores by category, the pictures, uint8 (N, H, W, 3), their captions, and which of them are right."""

    categories: dict[str, Score]
    pictures: dict[str, NDArray[np.uint8]]
    captions: dict[str, list[str]]
    right: dict[str, NDArray[np.bool_]]

    @property
    def overall(self) -> float:
        """The unweighted mean of the categories."""
        return float(np.mean([score.mean for score in self.categories.values()]))

    @property
    def error(self) -> float:
        """The standard error of `overall`."""
        errors = [score.error for score in self.categories.values()]
        return float(np.linalg.norm(errors) / len(errors))


def evaluation_scenes(
    category: str, count: int, seed: int, held_out: bool = False, benchmark: Benchmark = SHAPES
) -> list[Any]:
    """The scenes of the evaluation, which no training set contains."""
    purpose = f"composition {category}{' held out' if held_out else ''}"
    generators = (noise.generator(seed, purpose, index) for index in range(count))
    return [benchmark.scene(rng, category, held_out) for rng in generators]


def evaluate_composition(
    painter: Painter,
    benchmark: Benchmark = SHAPES,
    *,
    pictures: int,
    seed: int = 0,
    held_out: bool = False,
    folder: Path | None = None,
    **settings: Any,
) -> Composition:
    """Draw `pictures` a category, four a prompt, with the model's recommended settings or others.

    folder: where pictures are stored, so that an interrupted call can go on. Raises ModelError for a model whose
    pictures the benchmark cannot read.
    """
    _check_readable(benchmark, painter.model)
    images, scenes_of, kind = {}, {}, "held out" if held_out else "composition"
    for category in CATEGORIES:
        prompts = evaluation_scenes(category, -(-pictures // PICTURES_A_PROMPT), seed, held_out, benchmark)
        chosen = [scene for scene in prompts for _ in range(PICTURES_A_PROMPT)][:pictures]
        place, title = folder and folder / kind.replace(" ", "-") / category, f"{kind} {category}"
        captions = [benchmark.prompt(scene) for scene in chosen]
        images[category] = draw_pictures(painter, captions, seed=seed, folder=place, title=title, **settings)
        scenes_of[category] = chosen
    return _read(benchmark, images, scenes_of, PICTURES_A_PROMPT)


def ceiling(model: Model, benchmark: Benchmark = SHAPES, *, pictures: int, seed: int = 0) -> Composition:
    """The score of the scenes' own pictures after encoding and decoding."""
    _check_readable(benchmark, model)
    decoded, scenes_of = {}, {}
    for category in CATEGORIES:
        chosen = scenes_of[category] = evaluation_scenes(category, pictures, seed, benchmark=benchmark)
        decoded[category] = reconstructed(model, np.stack([benchmark.picture(scene) for scene in chosen]))
    return _read(benchmark, decoded, scenes_of, 1)


def _check_readable(benchmark: Benchmark, model: Model) -> None:
    if why := benchmark.lacking(model):
        raise ModelError(why)


def _read(
    benchmark: Benchmark, pictures: dict[str, NDArray[np.uint8]], scenes_of: dict[str, list[Any]], group: int
) -> Composition:
    """The benchmark's verdict on pictures, `group` of them a prompt."""
    right = {
        name: np.array([benchmark.is_right(p, scene) for p, scene in zip(rows, scenes_of[name], strict=True)])
        for name, rows in pictures.items()
    }
    captions = {name: [benchmark.prompt(scene) for scene in chosen] for name, chosen in scenes_of.items()}
    return Composition({name: _score(rows, group) for name, rows in right.items()}, pictures, captions, right)


def _score(right: NDArray[np.bool_], group: int) -> Score:
    """The share of right pictures; its error treats the pictures of one prompt as one draw."""
    groups = [right[i : i + group].mean() for i in range(0, len(right), group)]
    error = float(np.std(groups, ddof=1) / np.sqrt(len(groups))) if len(groups) > 1 else float("nan")
    return Score(float(right.mean()), error, len(right), tuple(map(float, groups)))
