"""Scenes composed of sprites: what they show, what their captions say, and what is never drawn in training."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw
from scipy import ndimage

from latentdiff import LatentDiffusionPipeline
from latentdiff.core.errors import DataError
from latentdiff.data.makers import ShapeScenes, SpriteScenes
from latentdiff.data.scenes import CATEGORIES, COLORS, HELD_OUT, PLACES, SHAPES
from latentdiff.data.sprites.captions import plural, sentence
from latentdiff.data.sprites.color import NEW_COLORS, main_color, recolored
from latentdiff.data.sprites.description import GROUNDS, Describer, is_held_out
from latentdiff.data.sprites.library import Library
from latentdiff.data.sprites.scene import UNIT, background, compose, render
from latentdiff.diffusion import noise
from scripts import emoji

from .conftest import ROOT
from .forked import SHORT

NAMES = [
    f"{first} {second}" for first in ("old", "new", "big", "odd") for second in ("cat", "fly", "box", "fish", "cup")
]
STYLES = ("flat", "noto", "round")


def disc(color, side=32):
    """A disc with a white spot, RGBA, half transparent around it."""
    image = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    draw.ellipse((1, 1, side - 2, side - 2), fill=(*color, 255))
    draw.rectangle((12, 12, 17, 17), fill=(255, 255, 255, 255))
    return image


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """20 names in three styles; all can be counted, and have a main colour or are grey."""
    folder = tmp_path_factory.mktemp("sprites")
    rows = []
    for number, name in enumerate(NAMES):
        color = list(COLORS)[number % len(COLORS)] if number % 4 else ""
        for style in STYLES:
            file = f"{style}/{name}.png"
            (folder / style).mkdir(exist_ok=True)
            disc(COLORS[color] if color else (90, 90, 90)).save(folder / file)
            row = {"file_name": file, "name": name, "style": style, "keywords": ["thing", name.split()[1], "toy"]}
            rows.append(row | {"color": color, "countable": True, "category": "toys", "unknown": 1})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Library(folder)


def picture_of(library, category, count=100, purpose="test", **more):
    """Scenes of a category, and the describer that made them."""
    describer = Describer(library, **more)
    for index in range(count):
        rng = noise.generator(0, f"{purpose} {category}", index)
        yield compose(describer.describe(rng, category), rng)


# colours


@pytest.mark.parametrize("old", COLORS)
def test_a_sprite_is_turned_to_every_color(old):
    sprite = np.asarray(disc(COLORS[old]))
    assert main_color(sprite) == old
    for new in NEW_COLORS:
        result = recolored(sprite, new)
        assert main_color(result) == new
        np.testing.assert_array_equal(result[..., 3], sprite[..., 3])
        np.testing.assert_array_equal(result[14, 14], sprite[14, 14])  # the white spot
        assert np.abs(result[4, 16, :3].astype(int) - COLORS[new]).max() <= 6


def test_shading_stays_when_a_sprite_is_turned():
    """Two brightnesses of red, 0.8 and 0.7, become two of blue in the same ratio."""
    sprite = np.full((8, 8, 4), 255, np.uint8)
    sprite[:4, :, :3], sprite[4:, :, :3] = (204, 20, 20), (178, 18, 18)
    result = recolored(sprite, "blue")[..., 2].astype(float)
    assert result[0, 0] / result[7, 0] == pytest.approx(204 / 178, rel=0.02)


def test_what_has_no_main_color():
    stripes = np.full((8, 8, 4), 255, np.uint8)
    stripes[:4, :, :3], stripes[4:, :, :3] = (220, 20, 20), (20, 20, 220)
    grey = np.asarray(disc((128, 128, 128)))
    empty = np.zeros((8, 8, 4), np.uint8)
    for sprite in (stripes, grey, empty):
        assert main_color(sprite) == ""
        np.testing.assert_array_equal(recolored(sprite, "red"), sprite)


# descriptions


@pytest.mark.parametrize("category", CATEGORIES)
def test_training_draws_nothing_that_is_held_out(library, category):
    assert len(library.held_out) > 0
    for scene in picture_of(library, category, 300, shapes=0.3):
        assert not any(is_held_out(group, library) for group in scene.description.groups)
    for scene in picture_of(library, category, 50, shapes=0.3, held_out=True):
        first, *rest = scene.description.groups
        assert is_held_out(first, library)
        assert not any(is_held_out(group, library) for group in rest)


def test_a_name_is_held_out_in_one_style(library):
    sprites = [library.sprites[row] for row in library.held_out]
    assert max(Counter(sprite.name for sprite in sprites).values()) == 1
    view = {scene.description.groups[0].sprite for scene in picture_of(library, "single", 2000, shapes=0)}
    assert len(view) == len(library) - len(library.held_out)


@pytest.mark.parametrize("category", CATEGORIES)
def test_the_categories(library, category):
    for scene in picture_of(library, category, 100):
        groups = scene.description.groups
        assert len(groups) == (2 if category in ("two", "position", "binding") else 1)
        assert (2 <= groups[0].count <= 4) == (category == "counting")
        assert len({group.name for group in groups}) == len(groups)
        assert len({group.sprite.style for group in groups if group.sprite}) <= 1
        assert not {group.color for group in groups} & {*scene.description.background}
        if category in ("colors", "binding"):
            assert all(group.color for group in groups)
            assert len({group.color for group in groups}) == len(groups)
        else:
            assert not any(group.is_recolored for group in groups)
        assert bool(scene.description.relation) or category != "position"


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_twin_differs_in_one_fact(library, category):
    """A twin that would be held out is another scene of the category; the others change one field."""
    describer = Describer(library, shapes=0.3)
    changes = Counter()
    for index in range(200):
        rng = noise.generator(1, "twin", index)
        description = describer.describe(rng, category)
        twin = describer.twin(description, rng)
        assert twin != description
        assert not any(is_held_out(group, library) for group in twin.groups)
        names = ("groups", "background", "relation", "place", "size")
        changes[tuple(name for name in names if getattr(description, name) != getattr(twin, name))] += 1
    assert sum(count for fields, count in changes.items() if len(fields) == 1) > 150


def test_a_scene_is_a_function_of_its_number(library):
    maker = SpriteScenes(Describer(library), (0.5, 0.1, 0.1, 0.1, 0.1, 0.1))
    first, again, other = (maker.scene(noise.generator(3, "key", index)) for index in (5, 5, 6))
    assert first == again
    assert first != other
    np.testing.assert_array_equal(maker.picture(first, 48), maker.picture(again, 48))


# captions


@pytest.mark.parametrize("category", CATEGORIES)
def test_captions_state_the_description(library, category):
    for scene in picture_of(library, category, 60):
        full, description = scene.captions[0], scene.description
        for group in description.groups:
            assert (group.name if group.count == 1 else plural(group.name)) in full
            assert not group.color or group.color in full
            if group.count > 1:
                assert full.startswith((str(group.count), ("two", "three", "four")[group.count - 2]))
        assert all(color in full for color in description.background)
        assert description.place is None or PLACES[description.place] in full
        assert not description.size or description.size in full
        if description.relation:
            assert any(word in full for word in (" left of ", " right of ", " above ", " below "))
        for short in scene.captions[1:]:
            assert len(short) <= len(full) + 20
            if category in ("colors", "binding"):
                assert all(group.color in short for group in description.groups)


def test_a_relation_seen_from_the_other_object_is_the_same(library):
    """Of "a above b" and "b below a" the object named first is the one for which the relation holds."""
    for scene in picture_of(library, "position", 60):
        first, second = scene.things
        up = {"above": first.y < second.y, "below": first.y > second.y}
        up |= {"left of": first.x < second.x, "right of": first.x > second.x}
        for caption in scene.captions:
            word = next(relation for relation in up if f" {relation} " in caption)
            swapped = caption.index(first.group.name) > caption.index(second.group.name)
            assert up[word] != swapped


def test_the_shortest_caption_is_the_noun_of_a_large_thing(library):
    rng = noise.generator(0, "short")
    for scene in picture_of(library, "single", 40, shapes=0):
        name, place, size = scene.description.groups[0].name, scene.description.place, scene.description.size
        shortest = min(scene.captions, key=len)
        if place is not None:
            assert all(PLACES[place] in caption for caption in scene.captions)
        elif size == "small":
            assert all("small" in caption for caption in scene.captions)
        else:
            assert shortest == name
    (scene,) = picture_of(library, "two", 1, shapes=0)
    first, second = scene.description.groups
    assert sentence(scene.description, lambda _: False, rng) == f"a {first.name} and a {second.name}".replace(
        "a old", "an old"
    ).replace("a odd", "an odd")


@pytest.mark.parametrize(
    ("name", "several"),
    [
        ("cat", "cats"),
        ("slice of pizza", "slices of pizza"),
        ("box", "boxes"),
        ("fly", "flies"),
        ("monkey", "monkeys"),
        ("grapes", "grapes"),
        ("glass of milk", "glasses of milk"),
        ("wolf", "wolves"),
        ("tropical fish", "tropical fish"),
        ("cactus", "cactuses"),
        ("woman", "women"),
    ],
)
def test_plurals(name, several):
    assert plural(name) == several


# pictures


def test_where_a_single_thing_stands(library):
    """In the middle, always of one size, unless its caption says small or names a place."""
    kinds = Counter()
    for scene in picture_of(library, "single", 300):
        (thing,), description = scene.things, scene.description
        kind = "placed" if description.place else description.size
        kinds[kind] += 1
        if kind == "placed":
            offsets = (thing.x - UNIT / 2, thing.y - UNIT / 2)
            assert tuple(round(math.copysign(abs(offset) > 5, offset)) for offset in offsets) == description.place
        elif kind == "small":
            assert 9 <= thing.radius <= 13
            assert all(thing.radius <= centre <= UNIT - thing.radius for centre in (thing.x, thing.y))
        else:
            assert (thing.x, thing.y, thing.radius) == (UNIT / 2, UNIT / 2, {"": 26, "large": 30}[kind])
    assert min(kinds[kind] for kind in ("placed", "small", "", "large")) > 5


def test_the_objects_are_where_the_layout_has_them(library):
    """Connected parts that differ from a plain background are the scene's objects, in their boxes."""
    size, looked_at = 128, 0
    for scene in picture_of(library, "counting", 40):
        if len(scene.description.background) > 1:
            continue
        looked_at += 1
        picture = render(scene, library, size)
        ground = GROUNDS[scene.description.background[0]]
        far = np.abs(picture.astype(int) - ground).max(-1) > 12
        boxes = ndimage.find_objects(ndimage.label(ndimage.binary_fill_holes(far))[0])
        assert len(boxes) == scene.description.groups[0].count
        centres = np.array([((b[1].start + b[1].stop) / 2, (b[0].start + b[0].stop) / 2) for b in boxes])
        expected = np.array([(thing.x * size / UNIT, thing.y * size / UNIT) for thing in scene.things])
        assert (np.abs(expected[:, None] - centres).max(-1).min(1) < 4).all()
    assert looked_at > 20


def test_no_two_objects_touch(library):
    for category in ("two", "counting", "position", "binding"):
        for scene in picture_of(library, category, 60):
            for number, one in enumerate(scene.things):
                assert one.radius <= one.x <= UNIT - one.radius
                for other in scene.things[:number]:
                    apart = max(abs(one.x - other.x), abs(one.y - other.y))
                    assert apart >= one.radius + other.radius


def test_backgrounds():
    plain = background(("blue",), 1.0, 8)
    assert (plain == COLORS["blue"]).all()
    graded = background(("black", "white"), 0.0, 5)  # from left to right
    np.testing.assert_array_equal(graded[2, :, 0], [0, 64, 128, 191, 255])
    np.testing.assert_array_equal(graded[0], graded[4])


# libraries


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read sprites"),
        ("", "has no sprite"),
        ("{", "metadata.jsonl line 1"),
        ('{"file_name": "a.png"}', "metadata.jsonl line 1: name: is missing"),
        ('{"file_name": "../a.png", "name": "x"}', "names a file outside its folder"),
        ('{"file_name": "a.png", "name": "x", "weight": -1}', "weight: must be at least 0"),
        ('{"file_name": "a.png", "name": "x", "weight": 0}', "has no sprite with a weight above 0"),
        ('{"file_name": "a.png", "name": "x", "keywords": "y"}', "keywords: must be a"),
    ],
)
def test_faults_of_a_library(tmp_path, text, message):
    if text is not None:
        (tmp_path / "metadata.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        Library(tmp_path)


def test_a_kind_whose_sprites_are_never_drawn(tmp_path):
    """Scenes of two things require countable ones, which all have the weight 0 here."""
    rows = [{"file_name": "a.png", "name": "x"}, {"file_name": "b.png", "name": "y", "countable": True, "weight": 0}]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    describer, rng = Describer(Library(tmp_path), shapes=0.0), np.random.default_rng(0)
    assert describer.describe(rng, "single").groups[0].name == "x"
    with pytest.raises(DataError, match=r"1 sprites of a kind all have the weight 0 \(.*metadata.jsonl\)"):
        describer.describe(rng, "counting")


def test_a_sprite_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "name": "x"}\n')
    (tmp_path / "a.png").write_text("<html>")
    with pytest.raises(DataError, match=r"a.png cannot be read"):
        Library(tmp_path).pixels(0)
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match=r"a.png cannot be read \(no such file or directory\)"):
        _ = Library(tmp_path).identity


def test_weights_are_shares(library):
    rng = np.random.default_rng(0)
    rows = np.array([0, 1])
    library._weights[1] = 3
    counts = Counter(library.draw(rng, rows).row for _ in range(2000))
    library._weights[1] = 1
    assert counts[1] / 2000 == pytest.approx(0.75, abs=4 * np.sqrt(0.75 * 0.25 / 2000))


def test_shapes_keep_their_held_out_pairs(library):
    seen = {
        (group.name, group.color)
        for scene in picture_of(library, "single", 600, shapes=1.0)
        for group in scene.description.groups
    }
    assert seen.isdisjoint(HELD_OUT)
    assert len(seen) == 6 * 8 - len(HELD_OUT)


# training


@pytest.mark.slow
def test_a_run_on_sprites_with_a_vocabulary_of_its_own(library, tmp_path, call):
    """All three stages; the model folder knows the sprites' names, and draws by the short vocabulary."""
    overrides = (*SHORT, "data.kind=sprites", f"data.sprites.source={library.folder}", "clip.merges=80")
    words = [word for each in overrides for word in ("--set", each)]
    code, _, err = call("train", ROOT / "configs" / "scenes-tiny.toml", "-o", "run", *words)
    assert code == 0, err
    model = tmp_path / "run" / "model"
    known = set((model / "words.txt").read_text().split())
    assert {word for name in NAMES for word in name.split()} | set(STYLES) | set(COLORS) <= known
    pipe = LatentDiffusionPipeline.from_pretrained(model)
    assert pipe.components["text_encoder"].config.vocab_size <= 514 + 80
    assert pipe("an odd cat on a blue background", seed=1, num_inference_steps=2, output_type="np").images.shape == (
        1,
        32,
        32,
        3,
    )
    theirs = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    ids = theirs.tokenizer("an odd cat", padding="max_length", return_tensors="pt").input_ids
    encoder = pipe.model.encoder
    np.testing.assert_array_equal(ids, encoder.tokenize(["an odd cat"]))
    rows = [json.loads(line) for line in (tmp_path / "run/clip/log.jsonl").read_text().splitlines()]
    assert any("top_1_of_twins" in row for row in rows)
    code, out, _ = call("info", model, "--find", "CAT")
    assert (code, out) == (0, "toys: big cat, new cat, odd cat, old cat\n")
    code, out, err = call("info", model, "--find", "dog")
    assert (code, out, err) == (0, "", "it draws nothing whose name contains 'dog'\n")
    shapes = sum(shape in known for shape in SHAPES)  # so few scenes may lack one
    assert json.loads(call("info", model)[1])["things"] == {"shapes": shapes, "toys": 20}
    pipe.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "things.json").read_bytes() == (model / "things.json").read_bytes()


# words


def test_captions_of_sprites_have_words_of_one_thing(tmp_path):
    """Colours, numbers, places, styles and shapes are free words, though one thing alone has them as keywords."""
    rows = [
        {"name": "ping pong", "style": "flat", "keywords": ["table", "red", "two", "corner", "background", "circle"]},
        {"name": "cat", "style": "flat", "keywords": ["pet", "flat"]},
        {"name": "dog", "style": "noto", "keywords": ["pet", "puppy"]},
    ]
    disc((1, 2, 3)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps({"file_name": "a.png", **row}) + "\n" for row in rows))
    maker = SpriteScenes(Describer(Library(tmp_path), 0.0), (1.0,) * 6)
    assert maker.of_one_thing() == {"ping": "ping pong", "pong": "ping pong", "table": "ping pong", "puppy": "dog"}
    assert ShapeScenes((1.0,) * 6).of_one_thing() == {}


@pytest.mark.parametrize(
    ("name", "subcategory", "asked"),
    [
        ("woman", "person", True),
        ("woman pilot", "person-role", False),  # beside pilot
        ("men wrestling", "person-sport", False),  # beside people wrestling
        ("woman dancing", "person-activity", True),  # nobody else dances
        ("man’s shoe", "clothing", True),
        ("couple with heart", "family", True),
        ("couple with heart with woman, man", "family", False),
        ("family of man, boy", "person-symbol", False),
        ("pirate flag", "flag", True),
        ("flag of France", "country-flag", False),
        ("six-thirty", "time", False),
        ("alarm clock", "time", True),
        ("regional indicator A", "other-symbol", False),
        ("keycap", "", False),
        ("red circle", "geometric", False),
        ("red heart", "heart", True),
        ("person running with facing right", "person-activity", False),
    ],
)
def test_emoji_that_are_left_out(name, subcategory, asked):
    """Those that differ from another one by gender only, and those that nobody asks for by name."""
    names = {"person", "pilot", "people wrestling", name}
    assert emoji.is_asked_for(name, subcategory, names) == asked


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("automobile", "car"),
        ("ring", "diamond ring"),
        ("person: bald", "bald person"),
        ("person: beard", "person with beard"),
        ("flag: France", "flag of France"),
    ],
)
def test_emoji_are_called_as_people_call_them(label, name):
    assert emoji.spoken(label) == name
