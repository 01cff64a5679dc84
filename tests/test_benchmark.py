"""What composition is measured on: objects in pictures, the judge, and its verdicts on scenes of sprites."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

from latentdiff.core.errors import ModelError
from latentdiff.core.images import to_images
from latentdiff.data.scenes import CATEGORIES, COLORS
from latentdiff.data.sprites.library import Library
from latentdiff.data.sprites.scene import UNIT, background, compose
from latentdiff.diffusion import noise
from latentdiff.evaluation import recognition
from latentdiff.evaluation.benchmark import ComposedShapes, SpriteBenchmark
from latentdiff.evaluation.judge import Judge
from latentdiff.evaluation.objects import background_of, cropped, objects

# names are patterns of 3 x 3 windows in a block, 1 where a window is open; any two differ in three or more;
# "hen" is held out in one style
PATTERNS = {"ant": 0b000000111, "bee": 0b111000000, "cow": 0b000111000, "hen": 0b111111111, "eel": 0b101010101}
STYLES = {"flat": (50, 50), "tall": (35, 50), "wide": (50, 35)}


def sprite(name, style, color):
    """A block of 5 x 5 cells, RGBA; the cells inside are transparent where the pattern says so."""
    cells = np.ones((5, 5), bool)
    cells[1:4, 1:4] = ~np.array([PATTERNS[name] >> k & 1 for k in range(9)], bool).reshape(3, 3)
    pixels = np.zeros((5, 5, 4), np.uint8)
    pixels[cells] = (*color, 255)
    canvas = Image.new("RGBA", (64, 64))
    width, height = STYLES[style]
    block = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
    canvas.paste(block, ((64 - width) // 2, (64 - height) // 2))
    return canvas


@dataclass
class WindowJudge:
    """A judge that reads the windows of a block; it names everything else "shape"."""

    side: int = 60
    classes: tuple[str, ...] = tuple(PATTERNS)
    architecture: str = "windows"
    look = Judge.look

    def best(self, squares, count=5):
        return [[self._name(square)] for square in squares]

    def features(self, squares):
        """The aspect of the block as a unit vector."""
        rows = []
        for square in squares:
            top, left, bottom, right = self._box(square)
            rows.append((bottom - top, right - left))
        return np.array(rows) / np.linalg.norm(rows, axis=1, keepdims=True)

    def _solid(self, square):
        return np.abs(square - background_of(square)).max(-1) > 28

    def _box(self, square):
        rows, columns = (np.flatnonzero(self._solid(square).any(axis)) for axis in (1, 0))
        return rows[0], columns[0], rows[-1] + 1, columns[-1] + 1

    def _name(self, square):
        top, left, bottom, right = self._box(square)
        places = [(0.3, 0.5, 0.7)[k // 3] for k in range(9)], [(0.3, 0.5, 0.7)[k % 3] for k in range(9)]
        y, x = (np.array(places[0]) * (bottom - top) + top), (np.array(places[1]) * (right - left) + left)
        solid = self._solid(square)[y.astype(int), x.astype(int)]
        border = self._solid(square)[top + (bottom - top) // 10, left:right].mean()
        bits = sum(1 << k for k, filled in enumerate(solid) if not filled)
        names = {pattern: name for name, pattern in PATTERNS.items()}
        return names.get(bits, "shape") if border > 0.9 else "shape"


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blocks")
    rows = []
    for number, name in enumerate(PATTERNS):
        color = list(COLORS)[number]
        for style in STYLES:
            sprite(name, style, COLORS[color]).save(folder / f"{name}-{style}.png")
            row = {"file_name": f"{name}-{style}.png", "name": name, "style": style, "color": color, "countable": True}
            rows.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return Library(folder)


@pytest.fixture(scope="module")
def benchmark(library):
    return SpriteBenchmark(library, 128, 0.0, WindowJudge())


def scenes(benchmark, category, count=24):
    return [benchmark.scene(noise.generator(0, category, index), category, False) for index in range(count)]


# objects


@pytest.mark.parametrize("colors", [("white",), ("blue",), ("red", "cyan"), ("black", "white")])
def test_a_background_is_fitted_behind_objects(colors):
    ground = background(colors, 0.7, 96)
    picture = ground.copy()
    picture[:40, 30:60] = (10, 200, 10)  # reaches the border
    error = np.abs(background_of(picture) - ground)
    assert np.quantile(error, 0.9) < (2 if len(colors) == 1 else 25)  # gradients are cut at their ends, fits are not
    (only,) = objects(picture)
    assert only.box == (0, 30, 40, 60)
    assert only.centre == (45, 20)


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_object_of_a_scene_is_found(benchmark, category):
    for scene in scenes(benchmark, category):
        parts = objects(benchmark.picture(scene))
        assert len(parts) == len(scene.things)
        centres = np.array([part.centre for part in parts])
        expected = np.array([(thing.x, thing.y) for thing in scene.things]) * 128 / UNIT
        assert (np.abs(expected[:, None] - centres).max(-1).min(1) < 3).all()


@pytest.mark.parametrize("category", CATEGORIES)
def test_the_oracle_reads_composed_shapes(category):
    """At 128 pixels, on plain and graded backgrounds; another scene's prompt is almost never right."""
    benchmark = ComposedShapes(128)
    image = scenes(benchmark, category, 100)
    pictures = [benchmark.picture(scene) for scene in image]
    right = [benchmark.is_right(picture, scene) for picture, scene in zip(pictures, image, strict=True)]
    assert np.mean(right) >= 0.97, [scene.description for scene, good in zip(image, right, strict=True) if not good]
    others = [benchmark.is_right(picture, scene) for picture, scene in zip(pictures, image[1:], strict=False)]
    assert np.mean(others) < 0.1


def test_specks_are_no_objects():
    picture = np.full((64, 64, 3), 255, np.uint8)
    picture[30, 30] = 0
    assert objects(picture) == []


def test_a_crop_shows_the_box_with_its_margin():
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[10:30, 20:40] = 255
    square = cropped(picture, (10, 20, 30, 40), 48, margin=0.1)  # 24 pixels of the picture
    rows = np.flatnonzero(square[24, :, 0] > 127)
    assert (rows[0], rows[-1]) == (4, 43)
    edge = cropped(np.full((8, 8, 3), 7, np.uint8), (0, 0, 8, 8), 16, margin=0.5)
    assert (edge == 7).all()


# the judge


def test_a_judge_is_saved_in_half_precision(tmp_path):
    torch.manual_seed(0)
    judge = Judge("resnet10t", 32, ["a", "b", "c"]).eval()
    judge.save(tmp_path)
    again = Judge.load(tmp_path)
    squares = np.random.default_rng(0).integers(0, 256, (70, 32, 32, 3), np.uint8)
    with torch.no_grad():
        torch.testing.assert_close(again(to_images(squares)), judge(to_images(squares)), rtol=0.02, atol=0.02)
        order = again(to_images(squares)).argsort(1, descending=True)[:, :2].tolist()
    assert again.best(squares, 2) == [[("a", "b", "c")[k] for k in row] for row in order]
    features = again.features(squares)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)


def test_what_is_no_judge(tmp_path):
    with pytest.raises(ModelError, match="no judge at"):
        Judge.load(tmp_path)
    (tmp_path / "judge.json").write_text('{"architecture": "resnet10t", "side": 32}')
    with pytest.raises(ModelError, match="cannot load judge"):
        Judge.load(tmp_path)


# verdicts


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_scene_s_own_picture_is_right_and_its_twin_s_is_wrong(benchmark, category):
    """A twin changes what the prompt states, except a background, a place or a style, which these prompts leave out."""
    describer = benchmark._describers[False]
    wrong = 0
    for number, scene in enumerate(scenes(benchmark, category)):
        assert benchmark.is_right(benchmark.picture(scene), scene)
        rng = noise.generator(1, "twin", number)
        twin = compose(describer.twin(scene.description, rng), rng)
        same = benchmark.prompt(twin) == benchmark.prompt(scene)
        if same:
            assert benchmark.is_right(benchmark.picture(twin), scene)
        elif category != "two":  # "a and b" is also true of "a above b"
            assert not benchmark.is_right(benchmark.picture(twin), scene)
            wrong += 1
    assert wrong > 12 or category in ("single", "two")


def test_prompts_are_what_people_type(benchmark):
    prompts = {category: benchmark.prompt(scenes(benchmark, category, 1)[0]) for category in CATEGORIES}
    names, colors = "|".join(PATTERNS), "|".join(COLORS)
    forms = {
        "single": f"an? ({names})",
        "two": f"an? ({names}) (and|above|below|(to the )?(left|right) of) an? ({names})",
        "counting": f"(two|three|four|2|3|4) ({names})s",
        "colors": f"an? ({colors}) ({names})",
        "position": f"an? ({names}) (above|below|(to the )?(left|right) of) an? ({names})",
        "binding": f"an? ({colors}) ({names}) (and|above|below|(to the )?(left|right) of) an? ({colors}) ({names})",
    }
    for category, form in forms.items():
        assert re.fullmatch(form, prompts[category]), prompts[category]


def test_a_prompt_of_a_held_out_style_names_it(benchmark, library):
    for index in range(20):
        scene = benchmark.scene(noise.generator(2, "held", index), "single", True)
        sprite_of = scene.description.groups[0].sprite
        assert sprite_of.row in library.held_out
        assert benchmark.prompt(scene).endswith(f", {sprite_of.style} style")


def test_own_pictures_are_recognised_and_are_at_no_distance(benchmark, library):
    """The true picture has distance 0 from itself; that of another style about as much as styles have."""
    sprites = recognition.chosen(library, 100, 0)
    assert sorted(sprite.name for sprite in sprites) == sorted(PATTERNS)
    assert not any(sprite.row in library.held_out for sprite in sprites)
    own = recognition.own_pictures(benchmark, sprites, 0)
    result = recognition.Recognition(sprites, (), own, recognition.named(benchmark.judge, own))
    np.testing.assert_array_equal(result.right(1), 1)
    np.testing.assert_allclose(recognition.style_distances(benchmark, result, 0), 0, atol=1e-3)
    others = [next(s for s in library.by_name[sprite.name] if s.style != sprite.style) for sprite in sprites]
    swapped = recognition.Recognition(sprites, (), recognition.own_pictures(benchmark, others, 0), [])
    assert (recognition.style_distances(benchmark, swapped, 0) > 0.3).all()


def test_prompts_of_things(library):
    assert recognition.prompt_of(library.sprites[0]) == "an ant, flat style"
