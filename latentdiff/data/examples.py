"""A set of pictures in an epoch: the caption of each sample, its crop, and whether it is mirrored.

All three are functions of (seed, row, epoch).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Protocol

import numpy as np

from latentdiff.core.images import luminance
from latentdiff.core.vocabulary import words_of
from latentdiff.data.buckets import Size
from latentdiff.data.captions import CaptionRule
from latentdiff.data.pictures import View
from latentdiff.data.transform import CENTER
from latentdiff.diffusion import noise


class Pictures(Protocol):
    """Captioned pictures by row."""

    def __len__(self) -> int: ...

    def size(self, row: int) -> Size:
        """(height, width) of a row in training."""
        ...

    def buckets(self) -> dict[Size, np.ndarray]:
        """The rows of each size."""
        ...

    def name(self, row: int) -> str:
        """The user's name of a row."""
        ...

    def captions(self, row: int) -> Sequence[str]:
        """The captions of a row, at least one."""
        ...

    def key(self, row: int, view: View) -> str:
        """The identity of the result of `pixels`, 32 hexadecimal digits."""
        ...

    def pixels(self, row: int, view: View, size: Size | None = None) -> np.ndarray:
        """uint8 (H, W, 3) of `size`, by default the row's."""
        ...

    def geometry(self, row: int, view: View) -> tuple[int, ...]:
        """(height, width) of the file, (top, left) of the crop in pixels of the view, (height, width) of the view."""
        ...

    def each(self, views: Sequence[tuple[int, View]]) -> Iterator[tuple[int, np.ndarray]]:
        """(index in `views`, pixels) of every row and view, in the order that is fastest to read."""
        ...

    def identity(self) -> str:
        """sha256 of everything that training reads."""
        ...


@dataclass(frozen=True)
class Examples:
    """See the module; `crop` is center, content or random."""

    pictures: Pictures
    seed: int
    rule: CaptionRule = field(default_factory=CaptionRule)
    crop: str = "center"
    flip: bool = False
    grey: bool = False
    purpose: str = "training"

    def __len__(self) -> int:
        return len(self.pictures)

    def image(self, row: int, epoch: int, size: Size | None = None) -> np.ndarray:
        """uint8 (H, W, C)."""
        return self.toned(self.pictures.pixels(row, self.view(row, epoch), size))

    def toned(self, pixels: np.ndarray) -> np.ndarray:
        """The pixels, or their luminance if the config asks for grey."""
        return luminance(pixels) if self.grey else pixels

    def caption(self, row: int, epoch: int) -> str:
        """The training prompt of a sample."""
        rng = noise.generator(self.seed, f"{self.purpose} caption", row, epoch)
        return self.rule.of(self.pictures.captions(row), rng)

    def view(self, row: int, epoch: int) -> View:
        """The crop of a sample and whether it is mirrored. The number of draws does not depend on the settings."""
        rng = noise.generator(self.seed, f"{self.purpose} view", row, epoch)
        top, left, side = rng.random(3)
        at = {"center": CENTER, "content": None, "random": (top, left)}[self.crop]
        return View(at, bool(self.flip and side < 0.5))

    def sizes(self, row: int, epoch: int) -> tuple[int, ...]:
        """SDXL's sizes: (height, width) of the file, (top, left) of the crop, (height, width) of the view."""
        return self.pictures.geometry(row, self.view(row, epoch))

    def every_view(self, row: int) -> list[View]:
        """Everything that `view` can return, if that is a finite set."""
        at = {"center": CENTER, "content": None}[self.crop]
        return [View(at, flipped) for flipped in ((False, True) if self.flip else (False,))]

    def key(self, row: int, view: View) -> str:
        """The identity of the result of `image`."""
        key = self.pictures.key(row, view)
        return hashlib.sha256(f"{key} grey".encode()).hexdigest()[:32] if self.grey else key

    def all_captions(self) -> Iterator[str]:
        """The captions of all pictures as they are in the data set."""
        return (caption for row in range(len(self)) for caption in self.pictures.captions(row))

    def words(self) -> frozenset[str]:
        """The words of all captions, templates and prefixes."""
        return words_of(chain(self.all_captions(), (self.rule.prefix,), self.rule.templates))

    def every_caption(self) -> list[str] | None:
        """Everything that `caption` can return, or None if tags are shuffled."""
        distinct: dict[str, None] = {}
        for row in range(len(self)):
            possible = self.rule.possible(self.pictures.captions(row))
            if possible is None:
                return None
            distinct |= dict.fromkeys(possible)
        return list(distinct)
