"""Several pictures as one: a grid with labels, or the steps of sampling as an animation."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from latentdiff.core.images import as_picture

CELL = 128  # pixels: smaller pictures are enlarged by a whole factor
GAP = 4
TEXT = 14  # pixels of the letters' height
MOST_CELLS = 400
FRAMES = 60  # at most, evenly spaced
FRAME, LAST = 80, 1500  # milliseconds


def grid(rows: Sequence[Sequence[Image.Image]], columns: Sequence[str], names: Sequence[str]) -> Image.Image:
    """Rows of pictures with the names of the columns above and of the rows on the left; empty names take no space.

    Smaller pictures stand in the middle of their cell.
    """
    cells = [[_enlarged(picture.convert("RGB")) for picture in row] for row in rows]
    width = max(cell.width for row in cells for cell in row)
    height = max(cell.height for row in cells for cell in row)
    font = ImageFont.load_default(TEXT)
    letters = max(8, int(width / font.getlength("n")))
    above = [_lines(text, letters) for text in columns]
    beside = [_lines(text, letters) for text in names]
    line = TEXT + 4
    height = max(height, *(len(lines) * line for lines in beside), 0)
    top = max((len(lines) for lines in above), default=0) * line
    left = width if any(beside) else 0
    across, down = max(map(len, cells)), len(cells)
    size = left + across * (width + GAP) + GAP, top + down * (height + GAP) + GAP
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for column, lines in enumerate(above):
        pen.text((left + GAP + column * (width + GAP), 2), "\n".join(lines), "black", font)
    for row, lines in enumerate(beside):
        pen.text((GAP, top + GAP + row * (height + GAP)), "\n".join(lines), "black", font)
    for row, some in enumerate(cells):
        for column, cell in enumerate(some):
            x = left + GAP + column * (width + GAP) + (width - cell.width) // 2
            y = top + GAP + row * (height + GAP) + (height - cell.height) // 2
            sheet.paste(cell, (x, y))
    return sheet


def _lines(text: str, letters: int) -> list[str]:
    """A label in lines; names of settings break at their underscores."""
    return [line.replace(" _", "_") for line in textwrap.wrap(text.replace("_", " _"), letters)]


def _enlarged(picture: Image.Image) -> Image.Image:
    factor = max(1, CELL // max(picture.size))
    return picture if factor == 1 else picture.resize((picture.width * factor, picture.height * factor), 0)


def animation(frames: Sequence[np.ndarray]) -> bytes:
    """Pictures uint8 (H, W, C) as a GIF that stays on the last one; smaller frames are enlarged to its size."""
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), FRAMES)).round().astype(int))
    size = frames[-1].shape[1::-1]
    pictures = [as_picture(frames[index]) for index in chosen]
    pictures = [each if each.size == size else each.resize(size, Image.Resampling.NEAREST) for each in pictures]
    content = io.BytesIO()
    times = [FRAME] * (len(pictures) - 1) + [LAST]
    first, *others = [each.convert("RGB").quantize(256, dither=Image.Dither.NONE) for each in pictures]
    first.save(content, "GIF", save_all=True, append_images=others, duration=times, loop=0)
    return content.getvalue()
