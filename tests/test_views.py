"""Buckets, views and captions: what a sample shows, compared with closed forms."""

import numpy as np
import pytest

from latentdiff.core.errors import ConfigError
from latentdiff.data.buckets import bucket_table, cropped_share, nearest
from latentdiff.data.captions import CaptionRule
from latentdiff.data.transform import corner, place_by_content, view


def test_the_table_is_the_whole_of_its_definition():
    """Every side a multiple of the step, no more pixels than the square, within the aspect, none could be longer."""
    table = bucket_table(512, 64, 2.0)
    assert (512, 512) in table
    for height, width in table:
        short, long = sorted((height, width))
        assert (width, height) in table
        assert short % 64 == long % 64 == 0
        assert short * long <= 512 * 512 < short * (long + 64)
        assert long <= 2 * short
    assert len(table) == len(set(table))
    assert set(table) == {(512, 512), (448, 576), (576, 448), (384, 640), (640, 384)}
    assert bucket_table(64) == ((64, 64),)
    with pytest.raises(ConfigError, match="no bucket of step 33 fits a resolution of 64 within 2 to 1"):
        bucket_table(64, 33)
    with pytest.raises(ConfigError, match="bucket_step must be at most the resolution 64"):
        bucket_table(64, 128)


def test_pictures_go_to_the_nearest_aspect():
    table = bucket_table(512, 64, 2.0)
    for size in table:
        assert nearest((size[0] * 3, size[1] * 3), table) == size
    assert nearest((1000, 3000), table) == (384, 640)
    assert nearest((3000, 1000), table) == (640, 384)
    assert cropped_share((384, 640), (384, 640)) == 0
    assert cropped_share((1000, 2000), (512, 512)) == pytest.approx(0.5)
    assert cropped_share((2000, 1000), (512, 512)) == pytest.approx(0.5)


RAMP = np.add.outer(np.arange(40), np.arange(60) * 3).astype(np.uint8)[..., None].repeat(3, -1)


def test_views_of_the_own_size_are_the_picture():
    assert np.array_equal(view(RAMP, (40, 60)), RAMP)
    assert np.array_equal(view(RAMP, (40, 60), flipped=True), RAMP[:, ::-1])


@pytest.mark.parametrize(("at", "left"), [((0, 0), 0), ((0.5, 0.5), 10), ((1, 1), 20), ((0.3, 0.25), 5)])
def test_where_a_view_is_cropped(at, left):
    """At scale 1 exactly the part; only the long side is cut."""
    assert np.array_equal(view(RAMP, (40, 40), at), RAMP[:, left : left + 40])


def test_rounding_never_passes_the_border():
    """Sizes whose scale, multiplied back, is one unit in the last place too much."""
    rng, passed = np.random.default_rng(0), 0
    for _ in range(3000):
        height, width = (int(side) for side in rng.integers(20, 400, 2))
        size = [(56, 56), (64, 48), (100, 100)][rng.integers(3)]
        scale = min(height / size[0], width / size[1])
        if size[0] * scale > height or size[1] * scale > width:
            passed += 1
            assert view(np.zeros((height, width, 3), np.uint8), size, (0.3, 0.7)).shape == (*size, 3)
    assert passed > 20
    assert view(np.zeros((58, 58, 3), np.uint8), (56, 56)).shape == (56, 56, 3)


def test_views_keep_a_ramp_a_ramp():
    """Halved, a linear picture stays linear: the value at a pixel's centre, away from the border."""
    result = view(RAMP, (20, 30)).astype(float)
    rows, columns = np.mgrid[0:20, 0:30]
    expected = (2 * rows + 0.5) + 3 * (2 * columns + 0.5)
    assert np.abs(result[3:-3, 3:-3, 0] - expected[3:-3, 3:-3]).max() <= 1
    bigger = view(RAMP[:, :40], (80, 80)).astype(float)
    rows, columns = np.mgrid[0:80, 0:80]
    expected = (rows - 0.5) / 2 + 3 * (columns - 0.5) / 2
    assert np.abs(bigger[8:-8, 8:-8, 0] - expected[8:-8, 8:-8]).max() <= 1


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("at", [(0.5, 0.0), (0.5, 1.0), (0.5, 0.3)])
def test_the_corner_is_where_the_view_begins(at, flipped):
    """Pixels of a picture at twice the scale hold their column; mirrored, the columns are backwards."""
    columns = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (64, 200, 3))
    visible = view(columns, (32, 32), at, flipped)[0, :, 0].astype(float)
    top, left = corner((64, 200), (32, 32), at, flipped)
    first = 199 - visible[0] if flipped else visible[0]
    assert top == 0
    assert left == pytest.approx(first / 2, abs=1)


def test_the_place_by_content_is_spread_and_fixed():
    import hashlib

    places = np.array([place_by_content(hashlib.sha256(str(n).encode()).hexdigest()) for n in range(4000)])
    assert places.min() >= 0
    assert places.max() <= 1
    assert np.abs(places.mean(0) - 0.5).max() < 0.02
    assert place_by_content("f" * 64) == (1.0, 1.0)


def draw(rule, captions, times=4000):
    return [rule.of(captions, np.random.default_rng(number)) for number in range(times)]


def test_one_of_several_captions():
    share = np.mean([words == "a" for words in draw(CaptionRule(), ["a", "b", "c", "d"])])
    assert share == pytest.approx(0.25, abs=0.03)
    assert set(draw(CaptionRule("first"), ["a", "b"], 20)) == {"a"}


def test_tags_are_shuffled_behind_those_that_are_kept():
    rule = CaptionRule(shuffle_tags=True, keep_tags=1)
    result = draw(rule, ["dog, brown, running ,, outside"])
    orders = {words: result.count(words) for words in set(result)}
    assert len(orders) == 6
    assert all(sorted(words.split(", ")) == ["brown", "dog", "outside", "running"] for words in orders)
    assert all(words.startswith("dog, ") for words in orders)
    assert min(orders.values()) > 4000 / 6 * 0.8
    assert rule.possible(["dog, brown"]) is None


def test_templates_and_prefix():
    rule = CaptionRule("first", templates=("a photo of {}", "{}, closely"), prefix="sks: ")
    result = draw(rule, ["a {} cat"])
    assert set(result) == set(rule.possible(["a {} cat"])) == {"sks: a photo of a {} cat", "sks: a {} cat, closely"}
    assert np.mean([words.endswith("closely") for words in result]) == pytest.approx(0.5, abs=0.03)
    assert set(draw(rule, [""], 20)) == {""}
    assert set(draw(CaptionRule(shuffle_tags=True), [", ,"], 20)) == {", ,"}  # strange, but not unconditional


def test_a_choice_does_not_move_other_draws():
    """With the same key, what is shuffled stays shuffled alike when a template is added."""
    plain = draw(CaptionRule(shuffle_tags=True), ["a, b, c, d"], 50)
    framed = draw(CaptionRule(shuffle_tags=True, templates=("x {}",)), ["a, b, c, d"], 50)
    assert framed == [f"x {words}" for words in plain]
