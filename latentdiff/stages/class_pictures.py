"""Pictures of the class for prior preservation: drawn by the model before it is taught, once for a run.

`classes.json` in their folder says what they are, once all of them are there: what is missing or another then is told,
and never drawn anew in silence.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from latentdiff.config import Data, Pictures
from latentdiff.errors import DataError
from latentdiff.finetuning import FineTuning
from latentdiff.output import write_new
from latentdiff.picture_files import encoded
from latentdiff.pipeline import LatentDiffusionPipeline

_SAID = "classes.json"
_AT_ONCE = 8  # as always in the same company, a picture has the same bits however often the drawing was stopped


def class_data(config: FineTuning, folder: Path) -> Data:
    """The settings under which the pictures are read: no caption but the class prompt."""
    assert config.prior.prompt is not None
    source = config.prior.source or str(folder)
    pictures = Pictures(source=source, layout="uncaptioned", instance_prompt=config.prior.prompt)
    return Data(kind="pictures", grey=config.data.grey, pictures=pictures)


def draw_class(pipe: LatentDiffusionPipeline, config: FineTuning, folder: Path, model: str) -> None:
    """Draw what is not there yet; `model` is the identity of what draws. Raises DataError."""
    asked = {"prompt": config.prior.prompt, "seed": config.seed, "size": config.image_size, "model": model}
    if (folder / _SAID).is_file():
        _check(folder, asked, config.prior.pictures)
        return
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, config.prior.pictures, _AT_ONCE):
        numbers = range(first, min(first + _AT_ONCE, config.prior.pictures))
        if not all(_path(folder, number).is_file() for number in numbers):
            _draw(pipe, config, folder, numbers)
    sums = {path.name: _sha256(path) for path in sorted(folder.glob("*.png"))}
    write_new(folder / _SAID, (json.dumps({**asked, "pictures": sums}, indent=1) + "\n").encode())


def _draw(pipe: LatentDiffusionPipeline, config: FineTuning, folder: Path, numbers: range) -> None:
    side, prompt = config.image_size, config.prior.prompt
    settings: dict[str, Any] = {"height": side, "width": side, "seed": config.seed + numbers.start}
    drawn = pipe(prompt, num_images_per_prompt=len(numbers), **settings)
    for number, image, record in zip(numbers, drawn.images, drawn.metadata, strict=True):
        _path(folder, number).unlink(missing_ok=True)
        write_new(_path(folder, number), encoded(image, ".png", record))


def _check(folder: Path, asked: dict[str, Any], count: int) -> None:
    said = json.loads((folder / _SAID).read_text())
    sums = said.pop("pictures")
    if said != asked or len(sums) != count:
        raise DataError(f"the class pictures are of other settings ({folder}). Move them away to have new ones drawn")
    for name, expected in sums.items():
        fault = "missing" if not (folder / name).is_file() else "" if _sha256(folder / name) == expected else "another"
        if fault:
            raise DataError(f"class picture {name} is {fault} ({folder}). Move the folder away to have all drawn again")


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.png"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
