"""Pictures of the class for prior preservation, drawn by the model before its training, once for a run.

`classes.json` in their folder has their settings from the start, and their hashes once all are drawn. Pictures with
other settings, missing and changed ones raise an error; they are never silently redrawn.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from latentdiff.core.errors import DataError
from latentdiff.core.files import sha256_of, write_json, write_new
from latentdiff.drawing.draw import draw, jobs_of, requested
from latentdiff.drawing.files import encoded
from latentdiff.drawing.painter import Painter
from latentdiff.settings.config import Captions, Data
from latentdiff.settings.finetuning import FineTuning

_RECORD = "classes.json"
_AT_ONCE = 8  # a picture's bits depend on its batch, so batches are the same however often drawing was interrupted


def class_data(config: FineTuning, folder: Path) -> Data:
    """The data settings of the class pictures: the instance's, with the class prompt as the only caption."""
    own = {
        "source": config.prior.source or str(folder),
        "layout": "uncaptioned",
        "instance_prompt": config.prior.prompt,
        "validation_pictures": 0,
        "captions": Captions(),
    }
    return config.data.model_copy(update={"pictures": config.data.pictures.model_copy(update=own)})


def draw_class(painter: Painter, config: FineTuning, folder: Path, model: str) -> None:
    """Draw the pictures that are missing; model: the identity of the model. Raises DataError."""
    prior = config.prior
    settings = {
        "prompt": prior.prompt,
        "seed": config.seed,
        "size": config.image_size,
        "count": prior.pictures,
        "model": model,
    }
    record = _finished(folder, settings)
    if record is not None:
        _check(folder, record)
        return
    for first in range(0, prior.pictures, _AT_ONCE):
        numbers = range(first, min(first + _AT_ONCE, prior.pictures))
        if not all(_path(folder, number).is_file() for number in numbers):
            _draw(painter, config, folder, numbers)
    sums = {path.name: sha256_of(path) for path in (_path(folder, number) for number in range(prior.pictures))}
    _write_record(folder, {**settings, "pictures": sums})


def _finished(folder: Path, settings: dict[str, Any]) -> dict[str, str] | None:
    """The hashes of finished pictures with these settings, or None. Raises DataError."""
    path = folder / _RECORD
    if not path.is_file():
        if folder.exists() and any(folder.iterdir()):
            raise DataError(f"the folder for class pictures has other files ({folder}). Move them away")
        folder.mkdir(parents=True, exist_ok=True)
        _write_record(folder, settings)
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        sums = record.pop("pictures", None)
    except (ValueError, AttributeError, RecursionError):
        raise DataError(f"{_RECORD} is damaged ({folder}). Move the folder away to have new pictures drawn") from None
    if record != settings or not isinstance(sums, dict | None):
        raise DataError(f"the class pictures have other settings ({folder}). Move them away to have new ones drawn")
    return sums


def _write_record(folder: Path, tree: dict[str, Any]) -> None:
    """Write classes.json, whole or not at all."""
    write_json(folder / _RECORD, tree, indent=1)


def _draw(painter: Painter, config: FineTuning, folder: Path, numbers: range) -> None:
    settings: dict[str, Any] = {"height": config.image_size, "width": config.image_size, "num_images": len(numbers)}
    request = requested(painter, str(config.prior.prompt), seed=config.seed + numbers.start, **settings)
    made = draw(painter, jobs_of(painter.model, request))
    for number, image, record in zip(numbers, made.images, made.metadata, strict=True):
        _path(folder, number).unlink(missing_ok=True)
        write_new(_path(folder, number), encoded(image, ".png", record))


def _check(folder: Path, sums: dict[str, str]) -> None:
    for name, expected in sums.items():
        fault = (
            "missing" if not (folder / name).is_file() else "" if sha256_of(folder / name) == expected else "changed"
        )
        if fault:
            raise DataError(f"class picture {name} is {fault} ({folder}). Move the folder away to have all drawn again")


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.png"
