"""The kinds of procedural scenes: coloured shapes, and sprites on backgrounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from latentdiff.core.vocabulary import words_of, words_of_one_thing
from latentdiff.data import scenes
from latentdiff.data.sprites import scene as composed
from latentdiff.data.sprites.captions import frame
from latentdiff.data.sprites.description import Describer
from latentdiff.data.sprites.library import Library
from latentdiff.settings.config import Data


class Maker(Protocol):
    """Makes scenes of one kind. Only the maker itself looks into its scenes."""

    def scene(self, rng: np.random.Generator) -> Any:
        """A scene."""
        ...

    def twin(self, scene: Any, rng: np.random.Generator) -> Any:
        """A scene that differs in one fact."""
        ...

    def captions(self, scene: Any) -> Sequence[str]:
        """The captions of a scene, at least one."""
        ...

    def picture(self, scene: Any, size: int) -> np.ndarray:
        """The picture of a scene, uint8 (size, size, 3)."""
        ...

    def things(self) -> dict[str, tuple[str, ...]]:
        """The names of what is in the scenes, by category."""
        ...

    def of_one_thing(self) -> dict[str, str]:
        """The words that stand in captions of one thing alone, with its name."""
        ...

    def identity(self) -> list[Any]:
        """Everything that scenes depend on beside the random numbers, as JSON values."""
        ...


@dataclass(frozen=True)
class ShapeScenes:
    """Scenes of six shapes in eight colours. mix: shares of the categories."""

    mix: tuple[float, ...]

    def scene(self, rng: np.random.Generator) -> scenes.Scene:
        """See Maker."""
        return scenes.scene(rng, mix=self.mix)

    def twin(self, scene: scenes.Scene, rng: np.random.Generator) -> scenes.Scene:
        """See Maker."""
        return scenes.compose(scenes.twin(scene.description, rng), rng)

    def captions(self, scene: scenes.Scene) -> Sequence[str]:
        """See Maker."""
        return (scene.caption,)

    def picture(self, scene: scenes.Scene, size: int) -> np.ndarray:
        """See Maker."""
        return scenes.render(scene, size)

    def things(self) -> dict[str, tuple[str, ...]]:
        """See Maker."""
        return {"shapes": scenes.SHAPES}

    def of_one_thing(self) -> dict[str, str]:
        """See Maker. Each shape has one word, its name."""
        return {}

    def identity(self) -> list[Any]:
        """See Maker."""
        return [self.mix]


@dataclass(frozen=True)
class SpriteScenes:
    """Scenes of a library's sprites and of shapes. mix: shares of the categories."""

    describer: Describer
    mix: tuple[float, ...]

    def scene(self, rng: np.random.Generator) -> composed.Scene:
        """See Maker."""
        category = str(rng.choice(scenes.CATEGORIES, p=np.asarray(self.mix) / sum(self.mix)))
        return composed.compose(self.describer.describe(rng, category), rng)

    def twin(self, scene: composed.Scene, rng: np.random.Generator) -> composed.Scene:
        """See Maker."""
        return composed.compose(self.describer.twin(scene.description, rng), rng)

    def captions(self, scene: composed.Scene) -> Sequence[str]:
        """See Maker."""
        return scene.captions

    def picture(self, scene: composed.Scene, size: int) -> np.ndarray:
        """See Maker."""
        return composed.render(scene, self.describer.library, size)

    def things(self) -> dict[str, tuple[str, ...]]:
        """See Maker."""
        names: dict[str, set[str]] = {"shapes": {*scenes.SHAPES}} if self.describer.shapes else {}
        for sprite in self.describer.library.sprites:
            names.setdefault(sprite.category or "things", set()).add(sprite.name)
        return {category: tuple(sorted(names[category])) for category in sorted(names)}

    def of_one_thing(self) -> dict[str, str]:
        """See Maker. Words for colours, numbers, places and styles are free."""
        library = self.describer.library
        names = {name: [name, *chain.from_iterable(s.keywords for s in rows)] for name, rows in library.by_name.items()}
        free = words_of(chain(frame(), {sprite.style for sprite in library.sprites}))
        return {word: name for word, name in words_of_one_thing(names).items() if word not in free}

    def identity(self) -> list[Any]:
        """See Maker."""
        return [self.mix, self.describer.shapes, self.describer.library.identity]


def maker_of(data: Data) -> Maker:
    """The maker of a config's scenes. Raises DataError for a library of sprites that cannot be read."""
    if data.kind == "sprites":
        source = Path(data.sprites.source) if data.sprites.source else None
        return SpriteScenes(Describer(Library(source), data.sprites.shapes), data.mix)
    return ShapeScenes(data.mix)
