"""Pictures of the class for prior preservation: drawn by the model before it is taught, once for a run.

`classes.json` in their folder says of what they are before the first is drawn, and what each is once all are there:
pictures of other settings, missing or altered ones are told, and never drawn anew in silence.
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

_SAID = "classes.json"
_AT_ONCE = 8  # as always in the same company, a picture has the same bits however often the drawing was stopped


def class_data(config: FineTuning, folder: Path) -> Data:
    """The settings under which the pictures are read: as the thing's own, but with no caption but the class prompt."""
    own = {
        "source": config.prior.source or str(folder),
        "layout": "uncaptioned",
        "instance_prompt": config.prior.prompt,
        "validation_pictures": 0,
        "captions": Captions(),
    }
    return config.data.model_copy(update={"pictures": config.data.pictures.model_copy(update=own)})


def draw_class(painter: Painter, config: FineTuning, folder: Path, model: str) -> None:
    """Draw what is not there yet; `model` is the identity of what draws. Raises DataError."""
    prior = config.prior
    asked = {
        "prompt": prior.prompt,
        "seed": config.seed,
        "size": config.image_size,
        "count": prior.pictures,
        "model": model,
    }
    record = _said(folder, asked)
    if record is not None:
        _check(folder, record)
        return
    for first in range(0, prior.pictures, _AT_ONCE):
        numbers = range(first, min(first + _AT_ONCE, prior.pictures))
        if not all(_path(folder, number).is_file() for number in numbers):
            _draw(painter, config, folder, numbers)
    sums = {path.name: sha256_of(path) for path in (_path(folder, number) for number in range(prior.pictures))}
    _say(folder, {**asked, "pictures": sums})


def _said(folder: Path, asked: dict[str, Any]) -> dict[str, str] | None:
    """The sums of finished pictures of these settings; None where there are none yet. Raises DataError."""
    path = folder / _SAID
    if not path.is_file():
        if folder.exists() and any(folder.iterdir()):
            raise DataError(f"there is something else where class pictures are to be ({folder}). Move it away")
        folder.mkdir(parents=True, exist_ok=True)
        _say(folder, asked)
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        sums = record.pop("pictures", None)
    except (ValueError, AttributeError, RecursionError):
        raise DataError(f"{_SAID} is damaged ({folder}). Move the folder away to have new pictures drawn") from None
    if record != asked or not isinstance(sums, dict | None):
        raise DataError(f"the class pictures are of other settings ({folder}). Move them away to have new ones drawn")
    return sums


def _say(folder: Path, tree: dict[str, Any]) -> None:
    """Whole or not there."""
    write_json(folder / _SAID, tree, indent=1)


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
            "missing" if not (folder / name).is_file() else "" if sha256_of(folder / name) == expected else "another"
        )
        if fault:
            raise DataError(f"class picture {name} is {fault} ({folder}). Move the folder away to have all drawn again")


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.png"
