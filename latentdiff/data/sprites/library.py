"""A library of sprites: RGBA pictures of single things, each with a name and a style.

It is a folder with `metadata.jsonl`. A row has `file_name` and `name`, and may have `style`, `keywords`, `category`,
`color` (the main colour, which scenes may change), `countable` (whether "three ..." can be said of it) and `weight`
(how often it is drawn).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from latentdiff.core.decoding import FORMATS
from latentdiff.core.errors import DataError
from latentdiff.data.inside import check_link, named_inside
from latentdiff.data.source import lines_of
from latentdiff.settings.validation import first_fault

METADATA = "metadata.jsonl"
STYLE_HELD_OUT = 10  # one name in so many has a style in which training never draws it


@dataclass(frozen=True, slots=True)
class Sprite:
    """One picture of a thing. color: "" if no colour prevails."""

    row: int
    name: str
    style: str
    keywords: tuple[str, ...]
    category: str
    color: str
    countable: bool


class _Row(BaseModel):
    """A line of metadata; other keys are not read."""

    model_config = ConfigDict(extra="ignore", strict=True)

    file_name: str = Field(min_length=1)
    name: str = Field(min_length=1)
    style: str = ""
    keywords: list[str] = []
    category: str = ""
    color: str = ""
    countable: bool = False
    weight: float = Field(1.0, ge=0, strict=False)


class Library:
    """The sprites of a folder, in the order of its metadata; without a folder, none.

    Raises DataError for a row or a picture that is wrong.
    """

    def __init__(self, folder: Path | None):
        self.folder, self._metadata = folder or Path(), b"" if folder is None else _metadata(folder)
        lines = enumerate(lines_of(self._metadata, METADATA), 1)
        places = [(f"{METADATA} line {number}", line) for number, line in lines if line.strip()]
        rows = [_row(line, where) for where, line in places]
        if folder is not None and not sum(row.weight for row in rows):
            raise DataError(f"{folder / METADATA} has no sprite with a weight above 0")
        files = zip(rows, places, strict=True)
        self._files = [_inside(self.folder, row.file_name, where) for row, (where, _) in files]
        self._weights = np.array([row.weight for row in rows])
        self._pixels: dict[int, np.ndarray] = {}
        self.sprites = tuple(
            Sprite(number, row.name, row.style, tuple(row.keywords), row.category, row.color, row.countable)
            for number, row in enumerate(rows)
        )

    def __len__(self) -> int:
        return len(self.sprites)

    def pixels(self, row: int) -> np.ndarray:
        """The picture, uint8 (H, W, 4); it stays in memory, because scenes draw it again and again."""
        if row not in self._pixels:
            try:
                with Image.open(self._files[row], formats=FORMATS) as image:
                    self._pixels[row] = np.asarray(image.convert("RGBA"))
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                raise DataError(f"{self._files[row].name} cannot be read ({str(error)[:80].lower()})") from None
        return self._pixels[row]

    @cached_property
    def identity(self) -> str:
        """sha256 of the metadata and of all pictures."""
        digest = hashlib.sha256(self._metadata)
        for file in self._files:
            try:
                digest.update(hashlib.sha256(file.read_bytes()).digest())
            except OSError as error:
                raise DataError(f"{file.name} cannot be read ({(error.strerror or str(error)).lower()})") from None
        return digest.hexdigest()

    @cached_property
    def by_name(self) -> Mapping[str, tuple[Sprite, ...]]:
        """The sprites of each name, one a style."""
        groups: dict[str, list[Sprite]] = defaultdict(list)
        for sprite in self.sprites:
            groups[sprite.name].append(sprite)
        return {name: tuple(group) for name, group in groups.items()}

    @cached_property
    def held_out(self) -> frozenset[int]:
        """The rows that training never draws: of one in ten of the names in three styles or more, one style each.

        What is held out depends on the name alone, so that it stays when the library grows.
        """
        rows = set()
        for name, sprites in self.by_name.items():
            number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
            if len(sprites) >= 3 and number % STYLE_HELD_OUT == 0:
                rows.add(sorted(sprites, key=lambda sprite: sprite.style)[number // STYLE_HELD_OUT % len(sprites)].row)
        return frozenset(rows)

    def draw(self, rng: np.random.Generator, rows: np.ndarray) -> Sprite:
        """One of these rows, by their weights."""
        shares = np.cumsum(self._weights[rows])
        if not shares[-1]:
            raise DataError(f"{len(rows)} sprites of a kind all have the weight 0 ({self.folder / METADATA})")
        return self.sprites[rows[np.searchsorted(shares, rng.random() * shares[-1], side="right")]]


def _metadata(folder: Path) -> bytes:
    file = folder / METADATA
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read sprites: {file} ({(error.strerror or str(error)).lower()})") from None


def _row(line: str, where: str) -> _Row:
    try:
        return _Row.model_validate_json(line)
    except ValidationError as error:
        fault = first_fault(error)
        raise DataError(f"{where}: {fault.key or 'the row'}: {fault.message}") from None


def _inside(folder: Path, name: str, where: str) -> Path:
    """The file of a row. Raises DataError for one outside the folder."""
    path = folder / named_inside(PurePosixPath(), name, where)
    check_link(path, folder, follow_links=False)
    return path
