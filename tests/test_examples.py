"""What a config's data set is made into: held-out pictures, the views and words of an epoch, remembered captions."""

import numpy as np
import pytest
import torch

from latentdiff.core.errors import DataError
from latentdiff.core.images import luminance
from latentdiff.data import dataset as pictures_module
from latentdiff.data import scene_set as scene_sets
from latentdiff.data.dataset import open_data
from latentdiff.data.survey import Survey
from latentdiff.settings.config import load_config, parse_config
from latentdiff.training.loader import batches_of

from .conftest import ROOT
from .pictures import LAYOUTS, as_jsonl, some_pictures


def opened(folder, **pictures):
    given = [(f"data.pictures.{key}", value) for key, value in pictures.items()]
    source = [("data.kind", "pictures"), ("data.pictures.source", str(folder)), ("image_size", 32)]
    return open_data(load_config(None, [*source, ("denoiser.cache", False), *given]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return as_jsonl(tmp_path_factory.mktemp("examples") / "set", some_pictures(40))


def ids(examples):
    return [examples.pictures.picture(row).id for row in range(len(examples))]


@pytest.mark.parametrize("layout", ["shards", "sidecars"])
def test_held_out_pictures_are_never_trained_on(folder, layout, tmp_path):
    """Chosen by what they are: the same ones in any layout."""
    data = opened(folder, validation_pictures=7)
    assert (len(data.training), len(data.validation)) == (33, 7)
    assert not set(ids(data.training)) & set(ids(data.validation))
    assert data.fingerprint["images"] == 33
    other = opened(LAYOUTS[layout](tmp_path / "set", some_pictures(40)), validation_pictures=7)
    assert ids(other.validation) == ids(data.validation)
    assert other.fingerprint == data.fingerprint
    everything = opened(folder)
    assert sorted(ids(everything.validation)) == sorted(ids(everything.training))
    assert everything.fingerprint != data.fingerprint


def test_a_sample_is_a_function_of_its_row_and_epoch(folder):
    first, again = (opened(folder, crop="random", flip=True).training for _ in range(2))
    images = {(row, epoch): first.image(row, epoch) for row in range(10) for epoch in range(4)}
    for (row, epoch), image in reversed(images.items()):
        assert np.array_equal(again.image(row, epoch), image)
    moved = [not np.array_equal(images[row, 0], images[row, epoch]) for row in range(10) for epoch in (1, 2, 3)]
    assert np.mean(moved) > 0.8
    fixed = opened(folder, crop="content").training
    assert all(np.array_equal(fixed.image(row, 0), fixed.image(row, 5)) for row in range(10))


def test_grey(folder):
    colour = opened(folder).training
    config = [("data.kind", "pictures"), ("data.pictures.source", str(folder)), ("image_size", 32), ("data.grey", True)]
    grey = open_data(load_config(None, config)).training
    assert np.array_equal(grey.image(3, 0), luminance(colour.image(3, 0)))
    view = grey.view(3, 0)
    assert grey.key(3, view) != colour.key(3, view)


def test_nothing_left_to_train_on_is_refused(folder):
    with pytest.raises(DataError, match="40 of 40 images are held out for validation"):
        opened(folder, validation_pictures=40)


def test_a_stream_is_looked_at_once(tmp_path, monkeypatch):
    """The survey is kept with the run; other settings survey the pictures again."""
    table = LAYOUTS["parquet"](tmp_path / "set", some_pictures(10))

    def opened_as(**pictures):
        source = {"kind": "pictures", "pictures": {"source": str(table), "streaming": True, **pictures}}
        return open_data(parse_config({"image_size": 32, "data": source}), tmp_path / "cache")

    first, looked = opened_as(), []
    monkeypatch.setattr(pictures_module, "survey", lambda *_, **__: looked.append(1) or first.survey)
    again = opened_as()
    assert not looked
    assert again.fingerprint == first.fingerprint
    assert [again.training.caption(row, 0) for row in range(10)] == [
        first.training.caption(row, 0) for row in range(10)
    ]
    wanted = [(row, first.training.view(row, 0)) for row in range(10)]
    one, other = (dict(data.training.pictures.each(wanted)) for data in (first, again))
    assert all(np.array_equal(one[number], other[number]) for number in range(10))
    opened_as(caption_column="text")
    assert looked
    looked.clear()
    LAYOUTS["parquet"](tmp_path / "other", some_pictures(10, seed=1))
    (tmp_path / "other" / "train-00000.parquet").replace(table / "train-00000.parquet")
    opened_as(caption_column="text")
    assert looked


def test_captions_of_scenes_are_drawn_once(tmp_path, monkeypatch):
    config = load_config(ROOT / "configs" / "scenes-tiny.toml", ["data.count=30"])
    first = open_data(config, tmp_path).training
    sample, identity = first.every_caption(), first.pictures.identity()
    monkeypatch.setattr(scene_sets.Scenes, "_identity", identity)
    monkeypatch.setattr(scene_sets.Scenes, "scene", None)  # whoever draws again fails
    assert open_data(config, tmp_path).training.every_caption() == sample


def test_a_picture_that_fails_in_a_worker_is_one_line():
    """As without workers, not the worker's traceback."""

    def batch(positions):
        if positions.start == 6:
            raise DataError("a.png changed after the survey")
        return {"x": torch.tensor(positions)}

    for workers in (0, 2):
        shares = (range(first, first + 2) for first in range(0, 20, 2))
        result = []
        with pytest.raises(DataError, match=r"^a.png changed after the survey$"):
            for made in batches_of(batch, shares, workers, torch.device("cpu")):
                result.append(made["x"].tolist())
        assert result == [[0, 1], [2, 3], [4, 5]]


def test_a_survey_is_part_of_what_is_opened(folder):
    assert isinstance(opened(folder).survey, Survey)
