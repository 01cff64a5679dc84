"""Prior preservation: two losses and one gradient, and the class pictures that are drawn for it."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from latentdiff.core.errors import DataError
from latentdiff.data.dataset import open_data
from latentdiff.settings.finetuning import load_finetuning
from latentdiff.stages.class_pictures import class_data, draw_class
from latentdiff.training.prior import PriorStage

from .small import TinyNetwork, denoiser_stage


def test_the_loss_is_that_of_both():
    """E taught + weight E prior, sample by sample, of sets of different sizes; the gradient too."""
    network = TinyNetwork()
    taught, prior = denoiser_stage(5, network), denoiser_stage(9, network, purpose="prior")
    stage = PriorStage(taught, prior, 0.3)
    positions = range(4, 8)
    batch = stage.batch(positions)
    expected = taught.loss(network, taught.batch(positions)) + 0.3 * prior.loss(network, prior.batch(positions))
    assert torch.equal(stage.loss(network, batch), expected)
    half = {name: tensor[:2] for name, tensor in batch.items()}
    torch.testing.assert_close(stage.loss(network, half), expected[:2], rtol=1e-6, atol=1e-6)
    assert stage.module is network
    assert stage.sample_ids(range(1)) == [f"{taught.sample_ids(range(1))[0]} with {prior.sample_ids(range(1))[0]}"]
    (of_prior,) = torch.autograd.grad(prior.loss(network, prior.batch(positions)).mean(), network.conv.weight)
    (of_taught,) = torch.autograd.grad(taught.loss(network, taught.batch(positions)).mean(), network.conv.weight)
    (of_both,) = torch.autograd.grad(stage.loss(network, batch).mean(), network.conv.weight)
    torch.testing.assert_close(of_both, of_taught + 0.3 * of_prior)


@pytest.fixture
def config():
    overrides = ("data.kind=pictures", "data.pictures.source=x", "method=dreambooth", 'prior.prompt="a star"')
    return load_finetuning(None, (*overrides, "prior.pictures=10", "image_size=64", "seed=5"))


def test_class_pictures_are_drawn_once(pipe, config, tmp_path):
    """Drawn by the model with consecutive seeds in fixed batches: a kill on the way changes none of them."""
    draw_class(pipe.painter, config, tmp_path / "whole", "m")
    names = sorted(path.name for path in (tmp_path / "whole").glob("*.png"))
    assert names == [f"{number:05d}.png" for number in range(10)]
    expected = pipe("a star", seed=13, num_images_per_prompt=2, height=64, width=64).images
    for name, image in zip(names[8:], expected, strict=True):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "whole" / name)), np.asarray(image))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for name in names[3:]:
        (tmp_path / "cut" / name).unlink()
    classes = json.loads((tmp_path / "cut" / "classes.json").read_text())
    classes.pop("pictures")  # which is written at the end
    (tmp_path / "cut" / "classes.json").write_text(json.dumps(classes))
    other = config.model_copy(update={"prior": config.prior.model_copy(update={"prompt": "a ring"})})
    with pytest.raises(DataError, match="have other settings"):
        draw_class(pipe.painter, other, tmp_path / "cut", "m")
    draw_class(pipe.painter, config, tmp_path / "cut", "m")
    for name in (*names, "classes.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    data = open_data(config.model_copy(update={"data": class_data(config, tmp_path / "cut")}))
    assert len(data.training) == 10
    assert {data.training.caption(row, 0) for row in range(10)} == {"a star"}


@pytest.mark.parametrize("fault", ["missing", "changed", "settings", "model", "damaged", "mine"])
def test_class_pictures_that_are_not_what_they_were(pipe, config, tmp_path, fault):
    """An error is raised, and nothing is overwritten."""
    folder = tmp_path / "classes"
    folder.mkdir()
    short = config.model_copy(update={"prior": config.prior.model_copy(update={"pictures": 2})})
    draw_class(pipe.painter, short, folder, "m")
    classes = json.loads((folder / "classes.json").read_text())
    assert list(classes["pictures"]) == ["00000.png", "00001.png"]
    if fault == "missing":
        (folder / "00001.png").unlink()
    if fault == "changed":
        (folder / "00001.png").write_bytes((folder / "00000.png").read_bytes())
    if fault == "damaged":
        (folder / "classes.json").write_text("{")
    if fault == "mine":
        (folder / "classes.json").unlink()
    messages = {"missing": "00001.png is missing", "changed": "00001.png is changed", "damaged": "is damaged"}
    expected = {**messages, "mine": "has other files"}.get(fault, "have other settings")
    options = config if fault == "settings" else short
    with pytest.raises(DataError, match=expected):
        draw_class(pipe.painter, options, folder, "other" if fault == "model" else "m")


def test_class_pictures_of_one_s_own(config, tmp_path):
    own = config.model_copy(update={"prior": config.prior.model_copy(update={"source": "mine"})})
    assert class_data(own, tmp_path).pictures.source == "mine"
