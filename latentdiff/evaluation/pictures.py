"""Pictures drawn for measurements, in batches of one size, stored in a folder so that a later start can go on.

Picture i of a list of prompts has seed `seed + i`. If one file of a batch is missing, the whole batch is drawn again,
since the batch affects the last bits of its pictures.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from latentdiff.core.errors import DataError
from latentdiff.core.files import write_new
from latentdiff.core.images import as_picture
from latentdiff.drawing.draw import draw_prompts
from latentdiff.drawing.painter import Painter
from latentdiff.drawing.pixels import reconstruct
from latentdiff.evaluation.large_arrays import DRAWN, batch_size, concatenated
from latentdiff.model import Model

AT_ONCE = 32


def draw_pictures(
    painter: Painter,
    prompts: Sequence[str],
    *,
    seed: int,
    folder: Path | None = None,
    title: str = "drawing",
    **settings: Any,
) -> np.ndarray:
    """A picture of each prompt, uint8 (N, H, W, C); brackets in prompts are text, not weights."""
    card, channels = painter.model.card, painter.model.codec.image_channels
    sides = [settings.get(name) or side for name, side in zip(("height", "width"), card.size, strict=True)]
    size = min(batch_size(DRAWN, sides, AT_ONCE), settings.pop("batch_size", AT_ONCE))
    texts = list(prompts)

    def batches() -> Iterator[np.ndarray]:
        with tqdm(total=len(texts), desc=title, unit="picture", disable=None) as bar:
            for first in range(0, len(texts), size):
                some = texts[first : first + size]
                files = [folder / f"{number:05d}.png" for number in range(first, first + len(some))] if folder else []
                if files and all(file.is_file() for file in files):
                    yield np.stack([read(file, (*sides, channels)) for file in files])
                else:
                    settings_of = {"prompt_weights": False, **settings}
                    pictures = draw_prompts(painter, some, seed=seed + first, batch_size=size, **settings_of)
                    for picture, file in zip(pictures, files, strict=False):
                        write(picture, file)
                    yield pictures
                bar.update(len(some))

    return concatenated(batches(), len(texts), folder)


def reconstructed(model: Model, pictures: np.ndarray) -> np.ndarray:
    """Pictures uint8 (N, H, W, C), encoded and decoded."""
    batches = np.array_split(pictures, -(-len(pictures) // AT_ONCE))
    return np.concatenate([reconstruct(model, batch) for batch in batches])


def write(picture: np.ndarray, file: Path) -> None:
    """Write uint8 (H, W, C) as a PNG, whole or not at all, unless it exists."""
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    as_picture(picture).save(content, "PNG")
    write_new(file, content.getvalue())


def read(file: Path, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Read what `write` wrote, (H, W, C). Raises DataError if it has another shape."""
    try:
        pixels = np.asarray(Image.open(file))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # damaged files
        raise DataError(f"a stored picture cannot be read ({file}). Remove it; it is drawn again") from None
    pixels = pixels if pixels.ndim == 3 else pixels[..., None]
    if shape is not None and pixels.shape != shape:
        raise DataError(f"{file} has another shape than the pictures drawn here. Remove it; it is drawn again")
    return pixels
