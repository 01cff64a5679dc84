"""Pictures that belong to those of a data set: of the same names, in another folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from latentdiff.core.errors import ConfigError, DataError
from latentdiff.data.dataset import picture_set, survey_of
from latentdiff.data.examples import Examples
from latentdiff.data.pictures import PictureSet
from latentdiff.data.survey import Picture
from latentdiff.settings.config import Settings


def companions(config: Settings, sets: Sequence[Examples], source: str, cache: Path | None = None) -> list[Examples]:
    """The pictures in the folder `source` whose names, without suffixes, are those of the sets, row by row.

    A row has the same crop in both. cache: a folder for slow results. Raises DataError if a picture is missing or has
    another size, ConfigError for crops that depend on the picture.
    """
    settings = config.data.pictures
    if settings.crop == "content":
        raise ConfigError("data.pictures.crop = content would crop a picture and its companion differently. Use center")
    own: dict[str, Any] = {"source": source, "layout": "uncaptioned", "allow_missing_captions": True}
    plain = settings.model_copy(update=own | {"instance_prompt": None})
    survey = survey_of(config.model_copy(update={"data": config.data.model_copy(update={"pictures": plain})}), cache)
    named: dict[str, Picture] = {}
    for picture in survey.accepted(False).pictures:
        if (same := named.setdefault(_stem(picture.name), picture)) is not picture:
            raise DataError(f"{same.name} and {picture.name} have the same name in {source}. Remove one of them")
    results = []
    for examples in sets:
        assert isinstance(examples.pictures, PictureSet)
        paired = []
        for picture in examples.pictures.each_picture():
            if (other := named.get(_stem(picture.name))) is None:
                raise DataError(f"{picture.name} has no picture of this name in {source}")
            if other.facts.size != picture.facts.size:
                sizes = " and ".join(f"{each.facts.size[1]}x{each.facts.size[0]}" for each in (picture, other))
                raise DataError(f"{picture.name} and its picture in {source} have different sizes: {sizes}")
            paired.append(replace(other, repeats=picture.repeats))
        results.append(replace(examples, pictures=picture_set(config, survey, paired, settings.bucket_step)))
    return results


def _stem(name: str) -> str:
    return PurePath(name).with_suffix("").as_posix()
