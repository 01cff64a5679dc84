"""Models trained from nothing that read a picture beside the noise: editing of pairs, and filling in."""

import json
import shutil

import numpy as np
import pytest
from diffusers import StableDiffusionInpaintPipeline, StableDiffusionInstructPix2PixPipeline
from PIL import Image

from latentdiff.core.errors import ConfigError
from latentdiff.core.images import to_uint8
from latentdiff.data.companions import companions
from latentdiff.data.dataset import open_data
from latentdiff.data.masks import random_mask
from latentdiff.networks.codecs.identity import IdentityCodec
from latentdiff.settings.config import load_config
from latentdiff.stages.beside import Edited, Masked

from .conftest import ROOT
from .stable_diffusion import load
from .test_enlarging import SMALL, NoCaptions, words_of

QUICK = SMALL | {
    "data.kind": "pictures",
    "image_size": 16,
    "clip.training.max_train_steps": 1,
    "clip.training.train_batch_size": 2,
}
EDITING = ROOT / "configs" / "maps-32.toml"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Noisy pictures, and those before them: their negatives."""
    folder, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    for name in ("after", "before"):
        (folder / name).mkdir()
    for number in range(12):
        pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "after" / f"{number}.png")
        Image.fromarray(255 - pixels).save(folder / "before" / f"{number}.png")
    return folder


def settings_of(pairs):
    own = {"data.pictures.source": str(pairs / "after"), "denoiser.editing.source": str(pairs / "before")}
    return QUICK | own | {"data.pictures.validation_pictures": 4}


def test_the_picture_before_is_read(pairs):
    settings = settings_of(pairs)
    config = load_config(EDITING, list(settings.items()))
    examples = open_data(config).training
    (before,) = companions(config, [examples], str(pairs / "before"))
    keys = [(row, epoch) for row in range(4) for epoch in range(50)]
    edited = Edited(NoCaptions(), before, IdentityCodec(3), 0.25, seed=0)
    beside = edited.conditions(edited.batch(keys, [True] * len(keys)))["beside"].numpy()
    is_visible = beside.any((1, 2, 3))
    assert abs(is_visible.mean() - 0.75) < 0.1, "a share is left out"
    for (row, epoch), picture in zip(keys, beside, strict=True):
        if picture.any():
            assert np.abs(to_uint8(picture[None])[0].astype(int) + examples.image(row, epoch) - 255).max() <= 1


@pytest.mark.quick("editing")
@pytest.mark.parametrize("kind", ["editing", "inpainting"])
def test_trained_and_resumed(pairs, tmp_path, call, kind):
    """Trained in two parts it ends with the same bits; diffusers knows the kind of model; it draws from a picture."""
    settings = settings_of(pairs) | {"autoencoder.kind": "kl", "autoencoder.training.max_train_steps": 2}
    settings |= {"autoencoder.block_out_channels": [8, 16], "autoencoder.training.train_batch_size": 2}
    settings |= {"autoencoder.crop": 16}
    if kind == "inpainting":
        settings |= {"denoiser.editing.source": "", "denoiser.inpainting": True, "denoiser.editing.dropout": 0.05}
    words = words_of(settings)
    less = [word.replace("steps=6", "steps=4") if "denoiser.training.max" in word else word for word in words]
    code, _, err = call("train", EDITING, "-o", tmp_path / "whole", *words)
    assert code == 0, err
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "denoiser")
    for part in (less, words):
        assert call("train", EDITING, "-o", tmp_path / "parts", *part, "--stage", "denoiser")[0] == 0
    first, second = (
        next((tmp_path / run / "model" / "unet").glob("*.safetensors")).read_bytes() for run in ("whole", "parts")
    )
    assert first == second
    model = tmp_path / "whole" / "model"
    kinds = {"editing": StableDiffusionInstructPix2PixPipeline, "inpainting": StableDiffusionInpaintPipeline}
    assert json.loads((model / "model_index.json").read_text())["_class_name"] == kinds[kind].__name__
    kinds[kind].from_pretrained(model)
    pipe = load(model)
    assert (pipe.model.must_edit, pipe.model.inpaints) == (kind == "editing", kind == "inpainting")
    picture = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    mask = np.zeros((16, 24), np.uint8)
    mask[4:12, 4:12] = 255
    more = {"mask_image": mask} if kind == "inpainting" else {}
    out = pipe("the map of a picture", image=picture, seed=1, output_type="uint8", **more).images
    assert out.shape == (1, 16, 24, 3)
    if kind == "inpainting":
        assert (out[0][mask == 0] == picture[mask == 0]).all()
    else:
        with pytest.raises(ConfigError, match="edits a picture: give one"):
            pipe("the map of a picture")
        with Image.open(sorted((tmp_path / "whole" / "denoiser" / "samples").glob("*.png"))[-1]) as sheet:
            before, _, after = np.asarray(sheet).reshape(3, 16, 64, 3)
        assert (before == 255 - after).all(), "the preview shows the pictures before of the validation set"


def test_masks():
    """Never empty; a quarter covers everything; the network reads the rest of the picture and grey under the mask."""
    rng = np.random.default_rng(0)
    masks = [random_mask(rng, (24, 32)) for _ in range(400)]
    assert all(set(np.unique(mask)) <= {0, 255} and mask.any() for mask in masks)
    assert abs(np.mean([mask.all() for mask in masks]) - 0.25) < 0.07
    shares = np.array([(mask > 0).mean() for mask in masks if not mask.all()])
    assert shares.min() < 0.1
    assert shares.max() > 0.6
    config = load_config(ROOT / "configs" / "scenes-tiny.toml", [("denoiser.inpainting", True)])
    examples = open_data(config).training
    masked = Masked(NoCaptions(), examples, IdentityCodec(3), seed=0)
    keys = [(row, 0) for row in range(8)]
    batch = masked.batch(keys, [True] * 8)
    seen, mask = batch["pixels"].numpy(), batch["masked"].numpy()
    true = np.stack([examples.image(*key) for key in keys]).transpose(0, 3, 1, 2) / np.float32(127.5) - 1
    assert (seen == np.where(mask == 1, 0, true.astype(np.float32))).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"denoiser.inpainting": True, "denoiser.editing.source": "x"}, "one of enlarging, editing and inpainting"),
        ({"denoiser.editing.dropout": 0.5}, "dropout has no effect"),
        ({"denoiser.editing.source": "x"}, "requires pictures of your own"),
        ({"denoiser.inpainting": True, "denoiser.tune_text_encoder": True}, "without tune_text_encoder"),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        load_config(ROOT / "configs" / "scenes-tiny.toml", list(settings.items()))


def test_the_pictures_before_are_a_part_of_the_data(pairs, tmp_path, call):
    """Missing pictures are named before any stage; a change of one is a change of the data, which may be accepted."""
    own = shutil.copytree(pairs, tmp_path / "pairs")
    words = words_of(settings_of(own) | {"denoiser.training.max_train_steps": 2})
    (own / "before" / "3.png").rename(tmp_path / "3.png")
    code, _, err = call("train", EDITING, "-o", tmp_path / "run", *words, "--dry-run")
    assert code == 3
    assert "3.png has no picture of this name in" in err
    (tmp_path / "3.png").rename(own / "before" / "3.png")
    Image.open(own / "before" / "1.png").convert("RGB").save(own / "before" / "1.jpg")
    code, _, err = call("train", EDITING, "-o", tmp_path / "run", *words, "--dry-run")
    assert code == 3
    assert "1.png and 1.jpg have the same name in" in err
    (own / "before" / "1.jpg").unlink()
    assert call("train", EDITING, "-o", tmp_path / "run", *words)[0] == 0
    shutil.copy(own / "before" / "1.png", own / "before" / "3.png")
    more = words_of(settings_of(own) | {"denoiser.training.max_train_steps": 4})
    code, _, err = call("train", EDITING, "-o", tmp_path / "run", *more, "--stage", "denoiser")
    assert code == 2
    assert "cannot resume: dataset changed" in err
    assert call("train", EDITING, "-o", tmp_path / "run", *more, "--stage", "denoiser", "--allow-changed")[0] == 0
