"""A surveyed data set as training reads it: by row, views of pictures and what is said of them."""

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
from latentdiff.data.buckets import Size, cropped_share, nearest
from latentdiff.data.source import Record, shown
from latentdiff.data.survey import Picture
from latentdiff.data.transform import CENTER, corner, place_by_content, view

_RULES = "1"  # of decoding and resizing; another number is another cache
_AT_ONCE = 64


@dataclass(frozen=True)
class View:
    """How a picture is shown in one epoch: from where it is cropped (None: by its content), and whether mirrored."""

    at: tuple[float, float] | None = CENTER
    flipped: bool = False


class PictureSet:
    """Pictures in the order of their identities, each as many rows as it is repeated."""

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

    def picture(self, row: int) -> Picture:
        """The picture of a row."""
        return self._pictures[self._of_row[row]]

    def size(self, row: int) -> Size:
        """(height, width) of its bucket."""
        return self._sizes[self._of_row[row]]

    def buckets(self) -> dict[Size, np.ndarray]:
        """The rows of each bucket that has any."""
        rows: dict[Size, list[int]] = defaultdict(list)
        for row in range(len(self)):
            rows[self.size(row)].append(row)
        return {size: np.array(rows[size]) for size in sorted(rows)}

    def cropped_share(self) -> float:
        """The mean share of a picture that its view leaves out."""
        sizes = zip(self._pictures, self._sizes, strict=True)
        shares = [cropped_share(picture.facts.size, size) for picture, size in sizes]
        return sum(shares) / max(len(shares), 1)

    def name(self, row: int) -> str:
        """What the user calls it."""
        return shown(self.picture(row).name)

    def captions(self, row: int) -> tuple[str, ...]:
        """At least one; the empty one where nothing is said."""
        return self.picture(row).captions

    def key(self, row: int, seen: View) -> str:
        """The identity of the pixels that `pixels` gives: of the bytes and everything done to them."""
        at = "content" if seen.at is None else seen.at
        said = f"{_RULES} {self.picture(row).id} {self.size(row)} {at} {seen.flipped} {self._background}"
        return hashlib.sha256(said.encode()).hexdigest()[:32]

    def geometry(self, row: int, seen: View) -> tuple[int, ...]:
        """(height, width) as stored, (top, left) of the view in its own pixels, (height, width) of the view."""
        picture, size = self.picture(row), self.size(row)
        at = place_by_content(picture.id) if seen.at is None else seen.at
        return (*picture.facts.size, *corner(picture.facts.size, size, at, seen.flipped), *size)

    def pixels(self, row: int, seen: View, size: Size | None = None) -> np.ndarray:
        """uint8 (*size, 3), of the bucket unless another size is asked for. Raises DataError."""
        if self._stream is not None:
            raise DataError("a streamed data set is read in its own order only, from caches")
        picture = self.picture(row)
        try:
            data = picture.read()
        except (DataError, OSError) as error:
            raise DataError(f"{self.name(row)} cannot be read any more ({error})") from None
        if hashlib.sha256(data).hexdigest() != picture.id:
            raise DataError(f"{self.name(row)} changed since it was looked at. Start again")
        return self._seen(data, row, seen, size)

    def each(self, wanted: Sequence[tuple[int, View]]) -> Iterator[tuple[int, np.ndarray]]:
        """(number in `wanted`, pixels) of every row and view, in the order they are best read in: a stream's own."""
        with silent_decoders():
            if self._stream is None:
                with ThreadPoolExecutor(os.cpu_count()) as pool:  # each holds a picture
                    for first in range(0, len(wanted), _AT_ONCE):
                        some = wanted[first : first + _AT_ONCE]
                        yield from enumerate(pool.map(lambda item: self.pixels(*item), some), first)
                return
            asked: dict[str, list[int]] = defaultdict(list)
            for number, (row, _) in enumerate(wanted):
                asked[self.picture(row).id].append(number)
            for record in self._stream:
                try:
                    data = record.read()
                except DataError:  # what is wanted could be read when it was looked at
                    continue
                for number in asked.pop(hashlib.sha256(data).hexdigest(), ()):
                    yield number, self._seen(data, *wanted[number])
            if asked:
                raise DataError(f"{len(asked)} pictures are not in the stream any more. Start again")

    def _seen(self, data: bytes, row: int, seen: View, size: Size | None = None) -> np.ndarray:
        picture = self.picture(row)
        at = place_by_content(picture.id) if seen.at is None else seen.at
        decoded = decode(data, self._background, self._max_pixels)
        return view(decoded.pixels, size or self.size(row), at, seen.flipped)

    def identity(self) -> str:
        """sha256 of what is learnt from: pictures, captions and repeats, wherever they lie."""
        digest = hashlib.sha256()
        for picture in self._pictures:
            digest.update(repr((picture.id, picture.captions, picture.repeats)).encode())
        return digest.hexdigest()
