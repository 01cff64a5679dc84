"""What composition is measured on: scenes with prompts, and a reader that says whether a picture shows one.

The oracle reads scenes of shapes. Scenes of sprites are read by finding the objects, naming each by the judge, and
naming its main colour.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import permutations
from typing import Any, ClassVar, Protocol

import numpy as np

from latentdiff.data import scenes
from latentdiff.data.sprites.captions import sentence
from latentdiff.data.sprites.color import main_color
from latentdiff.data.sprites.description import Describer, Group
from latentdiff.data.sprites.library import Library
from latentdiff.data.sprites.scene import Scene, compose, render
from latentdiff.diffusion import noise
from latentdiff.evaluation import oracle
from latentdiff.evaluation.judge import Judge
from latentdiff.evaluation.objects import cropped, objects, united
from latentdiff.model import Model, ModelCard

OF_COLORS = ("colors", "binding")


class Benchmark(Protocol):
    """See the module. reader: its name in a report."""

    @property
    def reader(self) -> str:
        """The name of the reader."""
        ...

    def scene(self, rng: np.random.Generator, category: str, held_out: bool) -> Any:
        """A scene of a category; held_out: with something that training never draws."""
        ...

    def prompt(self, scene: Any) -> str:
        """The prompt of a scene."""
        ...

    def picture(self, scene: Any) -> np.ndarray:
        """The scene's own picture, uint8 (H, W, 3)."""
        ...

    def is_right(self, picture: np.ndarray, scene: Any) -> bool:
        """Whether uint8 (H, W, 3) shows everything that the prompt states, and nothing else."""
        ...

    def lacking(self, model: Model) -> str | None:
        """Why a model's pictures cannot be read; None if they can."""
        ...


@dataclass(frozen=True)
class ShapeBenchmark:
    """Scenes of shapes, 64 x 64, read by the oracle."""

    reader: ClassVar[str] = "oracle"

    def scene(self, rng: np.random.Generator, category: str, held_out: bool) -> scenes.Scene:
        """See Benchmark."""
        return scenes.scene(rng, category, held_out=held_out)

    def prompt(self, scene: scenes.Scene) -> str:
        """See Benchmark."""
        return scene.caption

    def picture(self, scene: scenes.Scene) -> np.ndarray:
        """See Benchmark."""
        return scenes.render(scene)

    def is_right(self, picture: np.ndarray, scene: scenes.Scene) -> bool:
        """See Benchmark. The background must be one that scenes have."""
        reading = oracle.read(picture)
        return bool(reading.background) and oracle.satisfies(reading, scene.description)

    def lacking(self, model: Model) -> str | None:
        """See Benchmark."""
        if model.card.size == (scenes.SIZE, scenes.SIZE) and model.codec.image_channels == 3:
            return None
        size = f"{model.card.size[1]}x{model.card.size[0]}, {model.codec.image_channels} channels"
        return f"the oracle reads pictures of {scenes.SIZE}x{scenes.SIZE} in colour, not of {size}"


SHAPES = ShapeBenchmark()


@dataclass(frozen=True)
class Composed:
    """Composed scenes with prompts as people type them; subclasses read them. shapes: their share of the objects."""

    library: Library
    size: int
    shapes: float
    reader: ClassVar[str]

    def scene(self, rng: np.random.Generator, category: str, held_out: bool) -> Scene:
        """See Benchmark."""
        return compose(self._describers[held_out].describe(rng, category), rng)

    @cached_property
    def _describers(self) -> tuple[Describer, Describer]:
        """Of what training draws, and of what it holds out."""
        return Describer(self.library, self.shapes), Describer(self.library, self.shapes, held_out=True)

    def prompt(self, scene: Scene) -> str:
        """Number, colour where the category is about colours, names and relation; the style of what is held out."""
        held = any(g.sprite and g.sprite.row in self.library.held_out for g in scene.description.groups)
        stated = {"article", "relation"} | ({"style"} if held else set())
        return sentence(scene.description, stated.__contains__, noise.generator(0, "prompt of a scene"))

    def picture(self, scene: Scene) -> np.ndarray:
        """See Benchmark."""
        return render(scene, self.library, self.size)

    def lacking(self, model: Model) -> str | None:
        """See Benchmark."""
        if model.card.size == (self.size, self.size) and model.codec.image_channels == 3:
            return None
        return f"the {self.reader} reads pictures of {self.size}x{self.size} in colour"


@dataclass(frozen=True)
class ComposedShapes(Composed):
    """Composed scenes of shapes alone, which the oracle reads."""

    library: Library = field(default_factory=lambda: Library(None), init=False)
    shapes: float = field(default=1.0, init=False)
    reader: ClassVar[str] = "oracle"

    def is_right(self, picture: np.ndarray, scene: Scene) -> bool:
        """See Benchmark."""
        stated = scene.description
        groups = tuple(scenes.Group(group.name, group.color, group.count) for group in stated.groups)
        described = scenes.Description(stated.category, groups, stated.relation)
        return oracle.satisfies(oracle.read(picture), described)


def of_shapes(card: ModelCard) -> Benchmark:
    """Scenes of shapes that fit a model: one of named things has seen shapes on backgrounds of all colours."""
    names_things = bool((card.things or {}).keys() - {"shapes", "classes"})
    return ComposedShapes(card.size[0]) if names_things else SHAPES


@dataclass(frozen=True)
class SpriteBenchmark(Composed):
    """Composed scenes read by a judge. A name is right if it is among the judge's `among` likeliest."""

    judge: Judge
    among: int = 1
    reader: ClassVar[str] = "judge"

    def is_right(self, picture: np.ndarray, scene: Scene) -> bool:
        """See Benchmark. In the categories about colours, and for shapes, the main colour must be the stated one."""
        description = scene.description
        groups = [group for group in description.groups for _ in range(group.count)]
        parts = objects(picture)
        if len(groups) == 1 and description.category == "single" and parts:
            parts = [united(parts)]  # a thing may have several parts
        if len(parts) != len(groups):
            return False
        squares = np.stack([cropped(picture, part.box, self.judge.side) for part in parts])
        names = self.judge.best(squares, self.among)
        colors = [main_color(np.dstack([picture, 255 * part.mask.astype(np.uint8)])) for part in parts]

        def fits(group: Group, k: int) -> bool:
            about = group.sprite is None or description.category in OF_COLORS
            return group.name in names[k] and (not about or colors[k] == group.color)

        def related(first: int, second: int) -> bool:
            return scenes.holds(description.relation, parts[first].centre, parts[second].centre)

        return any(
            all(fits(group, k) for group, k in zip(groups, order, strict=True))
            and (not description.relation or related(*order[:2]))
            for order in permutations(range(len(parts)))
        )
