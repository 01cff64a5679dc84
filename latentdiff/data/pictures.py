"""A surveyed data set for training: pictures by row, their views and captions."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from latentdiff.core.decoding import MAX_PIXELS, WHITE, Color, decode, silent_decoders
from latentdiff.core.errors import DataError
from latentdiff.core.text import printable
from latentdiff.data.buckets import Size, cropped_share, nearest
from latentdiff.data.source import Record
from latentdiff.data.survey import Picture
from latentdiff.data.transform import CENTER, corner, place_by_content, view

_RULES = "1"  # version of decoding and resizing; another version has another cache
_AT_ONCE = 64


@dataclass(frozen=True)
class View:
    """The view of a picture in one epoch: where it is cropped (None: by its content), and whether it is mirrored."""

    at: tuple[float, float] | None = CENTER
    flipped: bool = False


class PictureSet:
    """Pictures in the order of their identities, each with as many rows as it has repeats."""

    def __init__(
        self,
        pictures: Sequence[Picture],
        table: Sequence[Size],
        background: Color = WHITE,
        max_pixels: int = MAX_PIXELS,
        stream: Iterable[Record] | None = None,
    ):
        self._pictures = list(pictures)
        self._of_row = [number for number, picture in enumerate(pictures) for _ in range(picture.repeats)]
        self._sizes = [nearest(picture.facts.size, table) for picture in pictures]
        self._background, self._max_pixels, self._stream = background, max_pixels, stream

    def __len__(self) -> int:
        return len(self._of_row)

    def each_picture(self) -> list[Picture]:
        """All pictures, each once."""
        return list(self._pictures)

    def picture(self, row: int) -> Picture:
        """The picture of a row."""
        return self._pictures[self._of_row[row]]

    def size(self, row: int) -> Size:
        """(height, width) of its bucket."""
        return self._sizes[self._of_row[row]]

    def buckets(self) -> dict[Size, np.ndarray]:
        """The rows of each bucket that is not empty."""
        rows: dict[Size, list[int]] = defaultdict(list)
        for row in range(len(self)):
            rows[self.size(row)].append(row)
        return {size: np.array(rows[size]) for size in sorted(rows)}

    def cropped_share(self) -> float:
        """The mean share of a picture's area outside its view."""
        sizes = zip(self._pictures, self._sizes, strict=True)
        shares = [cropped_share(picture.facts.size, size) for picture, size in sizes]
        return sum(shares) / max(len(shares), 1)

    def name(self, row: int) -> str:
        """The user's name of a row."""
        return printable(self.picture(row).name)

    def captions(self, row: int) -> tuple[str, ...]:
        """The captions of a row; the empty caption if it has none."""
        return self.picture(row).captions

    def key(self, row: int, seen: View) -> str:
        """The identity of the result of `pixels`: of the file's bytes and all operations on them."""
        at = "content" if seen.at is None else seen.at
        rules = f"{_RULES} {self.picture(row).id} {self.size(row)} {at} {seen.flipped} {self._background}"
        return hashlib.sha256(rules.encode()).hexdigest()[:32]

    def geometry(self, row: int, seen: View) -> tuple[int, ...]:
        """(height, width) of the file, (top, left) of the view in its own pixels, (height, width) of the view."""
        picture, size = self.picture(row), self.size(row)
        at = place_by_content(picture.id) if seen.at is None else seen.at
        return (*picture.facts.size, *corner(picture.facts.size, size, at, seen.flipped), *size)

    def pixels(self, row: int, seen: View, size: Size | None = None) -> np.ndarray:
        """uint8 (*size, 3), by default of the bucket's size. Raises DataError."""
        if self._stream is not None:
            raise DataError("a streamed data set is read in its own order only, from caches")
        picture = self.picture(row)
        try:
            data = picture.read()
        except (DataError, OSError) as error:
            raise DataError(f"{self.name(row)} cannot be read any more ({error})") from None
        if hashlib.sha256(data).hexdigest() != picture.id:
            raise DataError(f"{self.name(row)} changed after the survey. Start again")
        return self._seen(data, row, seen, size)

    def each(self, views: Sequence[tuple[int, View]]) -> Iterator[tuple[int, np.ndarray]]:
        """(index in `views`, pixels) of every row and view, in the order that is fastest to read: a stream's own."""
        with silent_decoders():
            if self._stream is None:
                with ThreadPoolExecutor(os.cpu_count()) as pool:  # each holds a picture
                    for first in range(0, len(views), _AT_ONCE):
                        some = views[first : first + _AT_ONCE]
                        yield from enumerate(pool.map(lambda item: self.pixels(*item), some), first)
                return
            missing: dict[str, list[int]] = defaultdict(list)
            for number, (row, _) in enumerate(views):
                missing[self.picture(row).id].append(number)
            for record in self._stream:
                try:
                    data = record.read()
                except (DataError, OSError):  # the survey says why
                    continue
                for number in missing.pop(hashlib.sha256(data).hexdigest(), ()):
                    yield number, self._seen(data, *views[number])
            if missing:
                raise DataError(f"{len(missing)} pictures are not in the stream any more. Start again")

    def _seen(self, data: bytes, row: int, seen: View, size: Size | None = None) -> np.ndarray:
        picture = self.picture(row)
        at = place_by_content(picture.id) if seen.at is None else seen.at
        decoded = decode(data, self._background, self._max_pixels)
        return view(decoded.pixels, size or self.size(row), at, seen.flipped)

    def identity(self) -> str:
        """sha256 of everything that training reads: pictures, captions and repeats, but not paths."""
        digest = hashlib.sha256()
        for picture in self._pictures:
            digest.update(repr((picture.id, picture.captions, picture.repeats)).encode())
        return digest.hexdigest()
