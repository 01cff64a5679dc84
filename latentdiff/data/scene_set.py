"""Procedural scenes as a set of pictures: every scene a function of (seed, purpose, row)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from latentdiff.data.buckets import Size
from latentdiff.data.makers import Maker
from latentdiff.data.memo import read_memo, write_memo
from latentdiff.data.pictures import View
from latentdiff.diffusion import noise
from latentdiff.settings.config import Settings


class Scenes:
    """Scenes of one purpose; rows beyond the last are scenes too, for stages that never repeat one.

    memo: a folder for the captions, which take a while to compute.
    """

    def __init__(self, config: Settings, maker: Maker, purpose: str, count: int, memo: Path | None = None):
        self._config, self.maker, self._purpose, self._count, self._memo = config, maker, purpose, count, memo

    def __len__(self) -> int:
        return self._count

    def scene(self, row: int) -> Any:
        """The scene itself, as its maker makes it."""
        return self.maker.scene(noise.generator(self._config.seed, self._purpose, row))

    def size(self, row: int) -> Size:
        """The size, which all scenes share; they are squares."""
        return self._config.image_size, self._config.image_size

    def buckets(self) -> dict[Size, np.ndarray]:
        """The rows of the only bucket."""
        return {self.size(0): np.arange(self._count)}

    def name(self, row: int) -> str:
        """The scene's number."""
        return f"scene {row}"

    def captions(self, row: int) -> Sequence[str]:
        """The captions of a scene."""
        return self._captions[row] if row < self._count else self.maker.captions(self.scene(row))

    def key(self, row: int, view: View) -> str:
        """The identity: a hash of the settings, the purpose and the number."""
        return hashlib.sha256(f"{self.identity()} {self._purpose} {row}".encode()).hexdigest()[:32]

    def pixels(self, row: int, view: View, size: Size | None = None) -> np.ndarray:
        """The rendered scene; scenes have one view."""
        return self.maker.picture(self.scene(row), self._config.image_size)

    def geometry(self, row: int, view: View) -> tuple[int, ...]:
        """The geometry of a picture that is not cropped."""
        return (*self.size(row), 0, 0, *self.size(row))

    def each(self, views: Sequence[tuple[int, View]]) -> Iterator[tuple[int, np.ndarray]]:
        """The pixels of all, in order."""
        yield from ((number, self.pixels(*item)) for number, item in enumerate(views))

    def identity(self) -> str:
        """sha256 of the settings and of the first scenes, so that a change of the rendering changes it too."""
        return self._identity

    @cached_property
    def _identity(self) -> str:
        data = self._config.data
        settings = [self._config.seed, self._config.image_size, data.grey, data.count, *self.maker.identity()]
        digest = hashlib.sha256(json.dumps(settings).encode())
        for row in range(min(16, self._count)):
            digest.update(self.pixels(row, View()).tobytes())
            digest.update("".join(self.maker.captions(self.scene(row))).encode())
        return digest.hexdigest()

    @cached_property
    def _captions(self) -> list[Sequence[str]]:
        """All captions, computed once for a run: for 50,000 scenes this takes seconds."""
        path, rules = self._memo and self._memo / "captions.jsonl", {"scenes": self.identity()}
        known = read_memo(path, rules) if path else []
        if len(known) == self._count:
            return known
        captions = [self.maker.captions(self.scene(row)) for row in range(self._count)]
        if path:
            write_memo(path, rules, captions)
        return captions
