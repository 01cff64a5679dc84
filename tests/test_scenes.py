"""Scenes and their oracle: it reads every rendered scene, rejects changed ones, and objects keep apart."""

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from latentdiff.data import scenes
from latentdiff.data.scenes import CATEGORIES, HELD_OUT, Description, Group, Scene, Thing
from latentdiff.diffusion.noise import generator
from latentdiff.evaluation import oracle


def draw(count, category=None, held_out=False, purpose="test"):
    return [scenes.scene(generator(0, purpose, i), category, held_out=held_out) for i in range(count)]


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("held_out", [False, True])
def test_oracle_reads_every_scene_right(category, held_out):
    for scene in draw(100, category, held_out):
        reading = oracle.read(scenes.render(scene))
        assert oracle.satisfies(reading, scene.description), scene.caption
        assert reading.background == scene.background


def test_oracle_finds_places_and_sizes_to_a_pixel():
    for scene in draw(100):
        things = oracle.read(scenes.render(scene)).things
        assert len(things) == len(scene.things)
        for true in scene.things:
            result = min(things, key=lambda thing: np.hypot(thing.x - true.x, thing.y - true.y))
            assert (result.shape, result.color) == (true.shape, true.color)
            assert np.hypot(result.x - true.x, result.y - true.y) < 1.5
            assert abs(result.radius - true.radius) < 1.5


def test_twins_contradict_each_other():
    """A picture never satisfies the description of its twin: they differ in a stated fact."""
    for i in range(300):
        rng = generator(0, "twin", i)
        scene = scenes.scene(rng)
        twin = scenes.twin(scene.description, rng)
        assert not twin.held_out
        if twin != scene.description and twin.groups[0].shape == scene.description.groups[0].shape:
            reading = oracle.read(scenes.render(scene))
            assert not oracle.satisfies(reading, twin), (scene.caption, twin)


CIRCLE = Thing("circle", "red", 20, 32, 9)
SQUARE = Thing("square", "blue", 46, 32, 9)
LEFT_OF = Description("position", (Group("circle", "red"), Group("square", "blue")), relation="left of")


def reading_of(*things):
    return oracle.read(scenes.render(Scene("white", things, LEFT_OF, "")))


@pytest.mark.parametrize(
    "things",
    [
        (CIRCLE,),
        (CIRCLE, SQUARE, Thing("star", "green", 32, 10, 7)),
        (replace(CIRCLE, x=46), replace(SQUARE, x=20)),
        (replace(CIRCLE, x=32, y=14), replace(SQUARE, x=32, y=46)),
        (replace(CIRCLE, color="blue"), replace(SQUARE, color="red")),
        (replace(CIRCLE, shape="square"), replace(SQUARE, shape="circle")),
        (replace(CIRCLE, shape="ring"), SQUARE),
        (CIRCLE, replace(SQUARE, color="purple")),
        (),
    ],
    ids=["missing", "extra", "swapped", "vertical", "colors", "shapes", "shape", "color", "empty"],
)
def test_oracle_is_strict(things):
    assert oracle.satisfies(reading_of(CIRCLE, SQUARE), LEFT_OF)
    assert not oracle.satisfies(reading_of(*things), LEFT_OF)


def test_oracle_survives_noise_and_refuses_garbage():
    rng = np.random.default_rng(0)
    clean = scenes.render(Scene("white", (CIRCLE, SQUARE), LEFT_OF, "")).astype(float)
    noisy = np.clip(clean + rng.normal(0, 8, clean.shape), 0, 255).astype(np.uint8)
    assert oracle.satisfies(oracle.read(noisy), LEFT_OF)
    assert not oracle.satisfies(oracle.read(rng.integers(0, 256, clean.shape, dtype=np.uint8)), LEFT_OF)


def test_training_never_draws_held_out_pairs():
    assert not any(scene.description.held_out for scene in draw(3000))
    assert {shape for shape, _ in HELD_OUT} == set(scenes.SHAPES)
    seen = Counter((g.shape, g.color) for scene in draw(3000) for g in scene.description.groups)
    assert set(seen) == set(scenes.PAIRS)


def test_held_out_scenes_hold_one():
    assert all(scene.description.held_out for category in CATEGORIES for scene in draw(20, category, held_out=True))


@pytest.mark.parametrize("category", CATEGORIES)
def test_captions_state_everything(category):
    """Every shape and colour is named, every count, place, size, relation and background that is described."""
    for scene in draw(200, category):
        words, description = scene.caption, scene.description
        for group in description.groups:
            assert group.color in words
            assert group.shape in words
            if group.count > 1:
                assert str(group.count) in words or scenes.NUMBERS[group.count] in words
        assert description.size in words
        if description.place is not None:
            assert scenes.PLACES[description.place] in words
        if description.background:
            assert f"{description.background} background" in words
        if description.relation:
            assert description.relation in words or scenes.INVERSE[description.relation] in words


def test_caption_s_order_of_objects_agrees_with_its_relation():
    """The two ways to say a relation are both drawn, and each names the objects in its own order."""
    ways = {scenes.caption(LEFT_OF, generator(0, "caption", i)) for i in range(200)}
    bare = {way for way in ways if way.startswith("a ") and " of " in way and "picture" not in way}
    assert "a red circle left of a blue square" in bare
    assert "a blue square to the right of a red circle" in bare
    for way in ways:
        first_is_circle = way.index("circle") < way.index("square")
        assert first_is_circle == ("left of" in way), way


def test_same_key_same_scene():
    first, again = draw(50), list(reversed([scenes.scene(generator(0, "test", i)) for i in reversed(range(50))]))
    assert first == again
    assert all((scenes.render(a) == scenes.render(b)).all() for a, b in zip(first, again, strict=True))


def test_a_mix_is_kept_to():
    """Shares of 0.75 and 0.25, given up to a factor, within four standard errors of 2,000 draws."""
    mix = (0.6, 0, 0, 0, 0.2, 0)
    result = [scenes.scene(generator(0, "mix", i), mix=mix).description.category for i in range(2000)]
    assert set(result) == {"single", "position"}
    assert result.count("single") / 2000 == pytest.approx(0.75, abs=4 * np.sqrt(0.75 * 0.25 / 2000))


def test_objects_keep_apart():
    for scene in draw(500):
        for a, b in itertools.combinations(scene.things, 2):
            assert max(abs(a.x - b.x), abs(a.y - b.y)) >= a.radius + b.radius + scenes.GAP - 1e-6
        for thing in scene.things:
            assert thing.radius <= thing.x <= scenes.SIZE - thing.radius
            assert thing.radius <= thing.y <= scenes.SIZE - thing.radius


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("circle", np.pi),
        ("square", 4 * 0.9**2),
        ("triangle", 1.8 * 1.8 / 2),
        ("ring", np.pi * (1 - 0.44**2)),
        ("cross", 4 * 0.34 * (2 - 0.34)),
        ("star", 5 * 0.45 * np.sin(np.pi / 5)),
    ],
)
def test_anti_aliased_area(shape, area):
    """The coverage sums to the shape's area: the fraction of a pixel is what is drawn of it."""
    for x in (32.0, 32.3, 31.77):
        total = scenes.coverage(shape, x, 32.1, 20.0, 64, 64).sum()
        assert total == pytest.approx(area * 400, rel=0.01)


def test_where_relations_hold():
    """y points down; on the diagonal none holds; the inverse holds for the objects in the other order."""
    truths = {(3, 1): "left of", (-3, 1): "right of", (1, 3): "above", (-1, -3): "below", (2, 2): None, (-2, 2): None}
    for place, truth in truths.items():
        for relation, inverse in scenes.INVERSE.items():
            assert scenes.holds(relation, (5, 5), (5 + place[0], 5 + place[1])) == (relation == truth)
            assert scenes.holds(inverse, (5 + place[0], 5 + place[1]), (5, 5)) == (relation == truth)
