"""GenEval's prompts (Ghosh et al. 2023; its file `evaluation_metadata.jsonl`), drawn in its evaluator's layout.

OUT/00000/metadata.jsonl       the prompt's own line
OUT/00000/samples/0000.png     and 0001, 0002, 0003
OUT/00000/grid.png             the four side by side
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from latentdiff.core.errors import ConfigError, DataError
from latentdiff.core.files import write_new
from latentdiff.drawing.draw import draw, jobs_of, requested
from latentdiff.drawing.painter import Painter
from latentdiff.drawing.request import request
from latentdiff.evaluation.pictures import read, write

PICTURES = 4  # a prompt
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


def read_prompts(file: Path) -> list[dict[str, Any]]:
    """The lines of the file: each has a `tag` and a `prompt`. Raises DataError."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read ({getattr(error, 'strerror', None) or 'not valid UTF-8'})") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_constant=_no_number)
        except (ValueError, RecursionError):
            raise DataError(f"{file.name} line {number} is not valid JSON") from None
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
            raise DataError(f'{file.name} line {number} has no "prompt"')
        try:
            request(prompt=row["prompt"], prompt_weights=False)
        except ConfigError as error:
            raise DataError(f"{file.name} line {number}: {error}") from None
        if row.get("tag") not in TAGS:
            raise DataError(f'{file.name} line {number}: "tag" is none of {", ".join(TAGS)} (got {row.get("tag")!r})')
        rows.append(row)
    if not rows:
        raise DataError(f"{file} has no prompts")
    return rows


def draw_geneval(
    painter: Painter, prompts: Sequence[dict[str, Any]], folder: Path, *, seed: int, **settings: Any
) -> Iterator[np.ndarray]:
    """Draw four pictures of each prompt, with consecutive seeds, unless they exist. Yields their grids.

    Raises DataError if the folder has the prompts of another file.
    """
    for index, row in enumerate(tqdm(prompts, "GenEval", unit="prompt", disable=None)):
        place = folder / f"{index:05d}"
        _note(place / "metadata.jsonl", row)
        files = [place / "samples" / f"{number:04d}.png" for number in range(PICTURES)]
        if not all(file.is_file() for file in files):
            counts = {"num_images": PICTURES, "batch_size": PICTURES, "seed": seed + PICTURES * index}
            made = requested(painter, row["prompt"], **{"prompt_weights": False, **counts, **settings})
            pictures = draw(painter, jobs_of(painter.model, made), "uint8").images
            for picture, file in zip(pictures, files, strict=True):
                write(picture, file)
        first = read(files[0])
        grid = np.concatenate([first, *(read(file, first.shape) for file in files[1:])], 1)
        write(grid, place / "grid.png")
        yield grid


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no JSON")


def _note(file: Path, row: dict[str, Any]) -> None:
    content = (json.dumps(row) + "\n").encode()
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_new(file, content)
    elif file.read_bytes() != content:
        raise DataError(f"{file} belongs to another prompt. Name another folder")
