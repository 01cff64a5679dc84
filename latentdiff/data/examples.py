"""A set of pictures as an epoch shows them: which caption a sample has, where it is cropped, whether it is mirrored.

All of it is a function of (seed, row, epoch).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from latentdiff.core.images import luminance
from latentdiff.data.buckets import Size
from latentdiff.data.captions import CaptionRule
from latentdiff.data.pictures import View
from latentdiff.data.transform import CENTER
from latentdiff.diffusion import noise


class Pictures(Protocol):
    """Captioned pictures by row."""

    def __len__(self) -> int: ...

    def size(self, row: int) -> Size:
        """(height, width) that a row is shown in."""
        ...

    def buckets(self) -> dict[Size, np.ndarray]:
        """The rows of each size."""
        ...

    def name(self, row: int) -> str:
        """What the user calls it."""
        ...

    def captions(self, row: int) -> Sequence[str]:
        """At least one."""
        ...

    def key(self, row: int, shown: View) -> str:
        """The identity, 32 hexadecimal digits, of what `pixels` gives."""
        ...

    def pixels(self, row: int, shown: View, size: Size | None = None) -> np.ndarray:
        """uint8 (H, W, 3), of the row's size unless another is asked for."""
        ...

    def geometry(self, row: int, shown: View) -> tuple[int, ...]:
        """(height, width) as stored, (top, left) of what is shown in pixels of the view, (height, width) of it."""
        ...

    def each(self, wanted: Sequence[tuple[int, View]]) -> Iterator[tuple[int, np.ndarray]]:
        """(number in `wanted`, pixels) of every row and view, in the order they are best read in."""
        ...

    def identity(self) -> str:
        """sha256 of what is learnt from."""
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
        """Grey where the config says so."""
        return luminance(pixels) if self.grey else pixels

    def caption(self, row: int, epoch: int) -> str:
        """The words of a sample."""
        rng = noise.generator(self.seed, f"{self.purpose} caption", row, epoch)
        return self.rule.of(self.pictures.captions(row), rng)

    def view(self, row: int, epoch: int) -> View:
        """Where a sample is cropped and whether it is mirrored. The same draws are taken whatever is switched on."""
        rng = noise.generator(self.seed, f"{self.purpose} view", row, epoch)
        top, left, side = rng.random(3)
        at = {"center": CENTER, "content": None, "random": (top, left)}[self.crop]
        return View(at, bool(self.flip and side < 0.5))

    def sizes(self, row: int, epoch: int) -> tuple[int, ...]:
        """What SDXL is told of a sample: (height, width) as stored, (top, left) of the crop, (height, width) shown."""
        return self.pictures.geometry(row, self.view(row, epoch))

    def every_view(self, row: int) -> list[View]:
        """All that `view` can return, where that is not without end."""
        at = {"center": CENTER, "content": None}[self.crop]
        return [View(at, flipped) for flipped in ((False, True) if self.flip else (False,))]

    def key(self, row: int, shown: View) -> str:
        """The identity of what `image` gives."""
        key = self.pictures.key(row, shown)
        return hashlib.sha256(f"{key} grey".encode()).hexdigest()[:32] if self.grey else key

    def every_caption(self) -> list[str] | None:
        """All that `caption` can return, or None where tags are shuffled."""
        distinct: dict[str, None] = {}
        for row in range(len(self)):
            possible = self.rule.possible(self.pictures.captions(row))
            if possible is None:
                return None
            distinct |= dict.fromkeys(possible)
        return list(distinct)
