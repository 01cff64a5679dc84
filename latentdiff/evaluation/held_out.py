"""The reference pictures of a model: held out, squares of one size, in an order that depends only on themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from latentdiff.core.images import coloured
from latentdiff.data.dataset import as_validated, by_identity, picture_set, survey_of
from latentdiff.data.examples import Examples
from latentdiff.data.makers import maker_of
from latentdiff.data.scene_set import Scenes
from latentdiff.data.survey import Picture, Survey
from latentdiff.evaluation.large_arrays import allocate
from latentdiff.settings.config import Settings

LARGEST = 2**30  # bytes of training pictures in memory
TRAINED = 4  # training pictures for each held-out one


def held_out(config: Settings, count: int, known: Survey | None = None) -> tuple[Examples, Examples | None]:
    """At most `count` captioned reference pictures, and training pictures if they are known.

    Scenes have a key that training never uses. The user's pictures are those that validation holds out; if none are,
    the first by their identity, which may have been trained on. known: an earlier survey. Raises DataError.
    """
    trained_count = min(TRAINED * count, max(1, LARGEST // (3 * config.image_size**2)))
    if config.data.is_procedural:
        maker, purposes = maker_of(config.data), {"evaluation scene": count, "training scene": trained_count}
        sets = [Scenes(config, maker, purpose, number) for purpose, number in purposes.items()]
        held, trained = (Examples(scenes, config.seed, grey=config.data.grey) for scenes in sets)
        return held, trained
    survey = known or survey_of(config).accepted(config.data.pictures.skip_bad)
    chosen, held_count = by_identity(survey.pictures), config.data.pictures.validation_pictures
    if not held_count:
        return _squares(config, survey, chosen[:count]), None
    ids = {picture.id for picture in chosen[:held_count]}
    rest = [picture for picture in chosen if picture.id not in ids]
    return _squares(config, survey, chosen[: min(count, held_count)]), _squares(config, survey, rest[:trained_count])


def _squares(config: Settings, survey: Survey, pictures: Sequence[Picture]) -> Examples:
    """The middle square of each picture, once, with its first caption."""
    once = list({picture.id: picture for picture in pictures}.values())
    return as_validated(config, picture_set(config, survey, once, None))


def pictures_of(examples: Examples, folder: Path | None = None) -> tuple[np.ndarray, list[str]]:
    """All pictures, uint8 (N, H, W, 3), and their captions. folder: a place for arrays too large for memory."""
    rows = range(len(examples))
    views = [(row, examples.view(row, 0)) for row in rows]
    pixels = allocate((len(examples), *examples.pictures.size(0), 3), folder)
    for number, each in examples.pictures.each(views):
        pixels[number] = coloured(examples.toned(each))
    return pixels, [examples.caption(row, 0) for row in rows]
