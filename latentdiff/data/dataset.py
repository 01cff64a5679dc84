"""The data set that a config describes: listed, surveyed, and split into training and validation sets."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from latentdiff.core.errors import DataError
from latentdiff.data import scenes
from latentdiff.data.buckets import bucket_table
from latentdiff.data.captions import CaptionRule
from latentdiff.data.examples import Examples
from latentdiff.data.layouts import find
from latentdiff.data.makers import maker_of
from latentdiff.data.memo import read_memo, write_memo
from latentdiff.data.pictures import PictureSet
from latentdiff.data.scene_set import Scenes
from latentdiff.data.source import Options
from latentdiff.data.survey import Picture, Survey, as_values, from_values, survey
from latentdiff.data.table import state_of
from latentdiff.settings.config import Config, Settings

VALIDATION = 128  # pictures of a validation


@dataclass(frozen=True)
class DataSet:
    """The training and validation sets of a run, and the survey of the user's pictures."""

    training: Examples
    validation: Examples
    survey: Survey | None = None
    beside: str = ""  # the identity of further pictures that training reads

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """The number of pictures and a sha256 of their contents."""
        own = self.training.pictures.identity()
        both = hashlib.sha256(f"{own} {self.beside}".encode()).hexdigest() if self.beside else own
        return {"images": len(self.training), "sha256": both}

    def write_quarantine(self, folder: Path) -> None:
        """Write `quarantine.jsonl`, which lists what this start leaves out, or remove an old one."""
        path = folder / "quarantine.jsonl"
        path.unlink(missing_ok=True)
        if self.survey and self.survey.left_out:
            self.survey.write_quarantine(path)


def open_data(config: Settings, cache: Path | None = None) -> DataSet:
    """The data set of a config; cache: a folder for slow results. Raises DataError for faults in it."""
    if config.data.is_procedural:
        maker, grey = maker_of(config.data), config.data.grey
        training = Scenes(config, maker, "training scene", config.data.count, cache)
        validation = Examples(Scenes(config, maker, "validation scene", VALIDATION), config.seed, grey=grey)
        return DataSet(Examples(training, config.seed, grey=grey), validation)
    result = survey_of(config, cache).accepted(config.data.pictures.skip_bad)
    return picture_data(config, result)


def readable(config: Config) -> bool:
    """Whether the oracle can read pictures of this config."""
    return config.data.kind == "scenes" and config.image_size == scenes.SIZE and not config.data.grey


def survey_of(config: Settings, cache: Path | None = None) -> Survey:
    """The survey of a config's own pictures. Raises DataError if nothing can be listed.

    A stream is read once for a run: its survey stays in `cache` until the settings change, or local files do.
    """
    settings = config.data.pictures
    options = Options(
        settings.layout,
        settings.split,
        settings.image_column,
        settings.caption_column,
        settings.streaming,
        settings.follow_links,
    )
    listing = find(settings.source, options)
    whole = cache / "streamed.jsonl" if cache and listing.streamed else None
    rules = [settings.model_dump(), state_of(settings.source)]
    if whole and (values := read_memo(whole, rules)):
        return from_values(listing, values)
    result = survey(
        listing,
        instance_prompt=settings.instance_prompt,
        allow_missing_captions=settings.allow_missing_captions,
        max_pixels=settings.max_pixels,
        memo=None if listing.streamed or not cache else cache / "decoded.jsonl",
    )
    if whole:
        write_memo(whole, rules, as_values(result))
    return result


def by_identity(pictures: Sequence[Picture]) -> list[Picture]:
    """Pictures in the order by which some are held out, which depends only on the pictures themselves."""
    return sorted(pictures, key=lambda picture: hashlib.sha256(picture.id.encode()).hexdigest())


def picture_data(config: Settings, survey: Survey) -> DataSet:
    """Training and validation sets of surveyed pictures; the identity of a picture decides whether it is held out."""
    settings = config.data.pictures
    held = by_identity(survey.pictures)
    held_ids = {picture.id for picture in held[: settings.validation_pictures]}
    if survey.pictures and len(held_ids) == len({picture.id for picture in survey.pictures}):
        count = len(survey.pictures)
        wanted = f"data.pictures.validation_pictures = {settings.validation_pictures}"
        raise DataError(f"{count} of {count} images are held out for validation ({wanted}). Hold out fewer")
    trained = [picture for picture in survey.pictures if picture.id not in held_ids]
    looked_at = [picture for picture in survey.pictures if picture.id in held_ids] or held[:VALIDATION]
    rule = CaptionRule(**settings.captions.model_dump())
    training = picture_set(config, survey, trained, settings.bucket_step)
    return DataSet(
        Examples(training, config.seed, rule, settings.crop, settings.flip, config.data.grey, "training"),
        as_validated(config, picture_set(config, survey, looked_at, settings.bucket_step)),
        survey,
    )


def picture_set(config: Settings, survey: Survey, pictures: Sequence[Picture], bucket_step: int | None) -> PictureSet:
    """Some of the surveyed pictures at the config's size; without bucket_step they are squares."""
    settings = config.data.pictures
    table = bucket_table(config.image_size, bucket_step, settings.bucket_max_aspect)
    stream = survey.listing.records if survey.listing.streamed else None
    return PictureSet(pictures, table, settings.background_color, settings.max_pixels, stream)


def as_validated(config: Settings, pictures: PictureSet) -> Examples:
    """Pictures without randomness: cropped in the middle, not flipped, with the first caption."""
    captions = config.data.pictures.captions
    rule = CaptionRule("first", templates=captions.templates[:1], prefix=captions.prefix)
    return Examples(pictures, config.seed, rule, grey=config.data.grey, purpose="validation")
