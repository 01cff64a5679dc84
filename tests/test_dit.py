"""The diffusion transformer: pictures of classes as diffusers' pipeline draws them; its training from nothing."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from PIL import Image

from latentdiff import LatentDiffusionPipeline
from latentdiff.core.errors import ConfigError, DataError, ModelError
from latentdiff.data.dataset import open_data
from latentdiff.drawing.record import read_metadata
from latentdiff.networks.backbones.dit import DiT
from latentdiff.networks.conditions import Conditions
from latentdiff.networks.encoders.class_labels import ClassLabels
from latentdiff.networks.encoders.prompt import Prompt
from latentdiff.settings.config import load_config
from latentdiff.stages.classes import classes_of

from .conftest import ROOT
from .stable_diffusion import load, openvino_like_torch

NAMES = ["white shark, great white", "umbrella", "tabby"]
OURS = {"output_type": "np"}
SPACED = {"clip_sample": False}  # and diffusers' defaults: leading, steps_offset 0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A DiT that draws 1,000 classes, of which three have names."""
    folder = tmp_path_factory.mktemp("classes") / "model"
    with torch.random.fork_rng():
        torch.manual_seed(4)
        transformer = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=8,
            num_embeds_ada_norm=1000,
        )
        for parameter in transformer.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(32, 32), latent_channels=4,
        )  # fmt: skip
    scheduler = DDIMScheduler(**SPACED)
    labels = {str(n): NAMES[n] if n < 3 else f"class {n}" for n in range(1000)}
    made = DiTPipeline(transformer, vae, scheduler, id2label=labels)
    made.set_progress_bar_config(disable=True)
    made.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"id2label": labels}))
    return folder, made


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("steps", [1, 4])
def test_as_diffusers_draws(place, guidance, steps):
    folder, theirs = place
    theirs.transformer.eval()
    options = {"num_inference_steps": steps, "guidance_scale": guidance}
    expected = theirs([0, 2], generator=torch.Generator().manual_seed(3), output_type="np", **options).images
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    image = load(folder)(["great white", "tabby"], latents=noise, **options, **OURS).images
    assert np.abs(image - expected).max() < 1e-4
    assert np.abs(image[0] - image[1]).max() > 1e-3


def test_as_diffusers_code_asks(place):
    folder, _ = place
    options = {"num_inference_steps": 2, "seed": 1, "output_type": "uint8"}
    pipe = load(folder)
    by_number = pipe(class_labels=[1, 999], **options).images
    assert (by_number == pipe(["umbrella", "class 999"], **options).images).all()
    with pytest.raises(ConfigError, match="class_labels"):
        pipe("umbrella", class_labels=[1], **options)
    with pytest.raises(ConfigError, match="class_labels"):
        pipe(class_labels="umbrella", **options)


def test_names_of_classes():
    encoder = ClassLabels(["white shark, great white", "7", "tabby, cat", "cat"])
    known = {"great white": 0, " white shark ": 0, "0": 0, "7": 1, "tabby": 2, "cat": 3, "": 4}
    assert {name: encoder.label(name) for name in known} == known, "a whole name comes before a part, then a number"
    assert encoder.encode(Prompt("3"))["label"] == 3
    composed, apart = "gr\u00f6\u00dfe", "gro\u0308\u00dfe"
    assert ClassLabels([composed]).label(apart) == 0, "the same letters"
    twice = ClassLabels(["crane, bird", "crane", "crane", "cat,"])
    assert (twice.label("crane"), twice.label("bird"), twice.label("")) == (1, 0, 4), "an empty part is no name"
    with pytest.raises(ConfigError, match=r"no class 'tabyb' \(did you mean tabby\?\)"):
        encoder.read("tabyb")


def test_another_size_and_no_other_shape(place):
    folder, theirs = place
    pipe = load(folder)
    noise = torch.randn(1, 4, 12, 12, generator=torch.Generator().manual_seed(3))
    label, time = torch.tensor([1]), torch.tensor([500])
    with torch.no_grad():
        expected = theirs.transformer.eval()(noise, time, label).sample[:, :4]
    own = pipe.model.backbone.predict(noise, 500.0, Conditions({"label": label.float()}))
    assert (own - expected).abs().max() < 1e-5
    assert pipe("tabby", width=24, height=24, num_inference_steps=1).images[0].size == (24, 24)
    with pytest.raises(ConfigError, match="this model draws squares"):
        pipe("tabby", width=24, height=16)
    with pytest.raises(ConfigError, match="no class 'table'"):
        pipe("table", num_inference_steps=1)


def test_saved_as_it_was(place, tmp_path):
    folder, theirs = place
    load(folder).save_pretrained(tmp_path / "saved")
    again = DiTPipeline.from_pretrained(tmp_path / "saved")
    assert (again.transformer.pos_embed.proj.weight == theirs.transformer.pos_embed.proj.weight).all()
    pictures = [load(where)("umbrella", num_inference_steps=2, seed=1, output_type="uint8").images
                for where in (tmp_path / "saved", folder)]  # fmt: skip
    assert (pictures[0] == pictures[1]).all()


@pytest.mark.slow
def test_openvino_draws_what_torch_draws(place, tmp_path):
    fast = openvino_like_torch(place[0], tmp_path, "tabby")
    with pytest.raises(ConfigError, match="another size requires the torch runtime"):
        fast("tabby", width=24, height=24)
    free = LatentDiffusionPipeline.from_pretrained(tmp_path / "model", device="cpu")
    with pytest.warns(UserWarning, match="another size requires torch"):
        assert free("tabby", width=24, height=24, num_inference_steps=1).images[0].size == (24, 24)


def test_wrong_names_of_classes(place, tmp_path):
    copy = shutil.copytree(place[0], tmp_path / "model")
    index = json.loads((copy / "model_index.json").read_text())
    for labels in ({"0": "one"}, "cat", {str(n): n for n in range(1000)}):
        (copy / "model_index.json").write_text(json.dumps(index | {"id2label": labels}))
        with pytest.raises(ModelError, match="id2label must"):
            load(copy)
    (copy / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if k != "id2label"}))
    assert load(copy).model.encoder.names[:2] == ("0", "1")


def test_a_new_one_is_the_identity_and_learns_by_keyed_draws():
    """Blocks add nothing before training; labels are never dropped by a global generator."""
    dit = DiT.create(sample_size=8, channels=1, classes=3, patch_size=2, layers=2, heads=2, head_width=8).train()
    x, label = torch.randn(4, 1, 8, 8), Conditions({"label": torch.tensor([0.0, 1.0, 2.0, 3.0])})
    assert (dit(x, 5, label) == 0).all()
    for parameter in dit.parameters():
        parameter.data += 0.1
    assert all((dit(x, 5, label) == dit(x, 5, label)).all() for _ in range(5))


@pytest.fixture(scope="module")
def stripes(tmp_path_factory):
    """Three classes of 8 x 8 pictures: rows, columns, and grey."""
    folder, rng = tmp_path_factory.mktemp("stripes"), np.random.default_rng(0)
    for name, picture in (("rows", np.indices((8, 8))[0] % 2), ("columns", np.indices((8, 8))[1] % 2), ("9", None)):
        (folder / name).mkdir()
        for number in range(8):
            pixels = np.full((8, 8), 128) if picture is None else 255 * picture
            noisy = np.clip(pixels + rng.integers(-9, 10, (8, 8)), 0, 255)
            Image.fromarray(np.uint8(noisy)).save(folder / name / f"{number}.png")
    return folder


def settings_of(stripes, **more):
    settings = {
        "data.pictures.source": str(stripes),
        "data.pictures.validation_pictures": 3,
        "denoiser.dit.layers": 2,
        "denoiser.dit.heads": 2,
        "denoiser.training.max_train_steps": 6,
        "denoiser.training.train_batch_size": 8,
        "denoiser.training.checkpointing_steps": 2,
        "denoiser.training.validation_steps": 6,
        "denoiser.training.lr_warmup_steps": 0,
        "denoiser.preview_pictures": 8,
        "recommended.num_inference_steps": 2,
        **more,
    }
    return [(key, value) for key, value in settings.items()]


def test_classes_of_folders(stripes):
    data = open_data(load_config(ROOT / "configs" / "digits-8.toml", settings_of(stripes)))
    assert classes_of(data.training) == ["9", "columns", "rows"]
    nested = stripes.parent / "nested"
    shutil.copytree(stripes, nested / "animals", dirs_exist_ok=True)
    shutil.copytree(stripes / "rows", nested / "rows", dirs_exist_ok=True)
    own = open_data(load_config(ROOT / "configs" / "digits-8.toml", settings_of(nested)))
    names = classes_of(own.training)
    assert names == ["animals/9", "animals/columns", "animals/rows", "rows"], "two folders of one name are two classes"
    few = stripes.parent / "few"
    for name in ("a", "b"):
        (few / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(stripes / "rows" / "0.png", few / name / f"{name}.png")
        Image.new("L", (8, 8), 9 if name == "a" else 99).save(few / name / f"{name}.png")
    settings = settings_of(few, **{"data.pictures.validation_pictures": 0})
    with pytest.raises(DataError, match="2 classes of 2 pictures: classes require two or more pictures"):
        classes_of(open_data(load_config(ROOT / "configs" / "digits-8.toml", settings)).training)
    with pytest.raises(ConfigError, match="instance_prompt has no effect"):
        load_config(ROOT / "configs" / "digits-8.toml", settings_of(stripes, **{"data.pictures.instance_prompt": "a"}))
    flat = load_config(ROOT / "configs" / "digits-8.toml", settings_of(stripes / "rows"))
    with pytest.raises(DataError, match="lies in no folder of a class"):
        open_data(flat)


def test_trained_from_nothing(stripes, tmp_path, call):
    """Trained in two parts it ends with the same bits; the model names its classes."""
    words = [f"--set={key}={value}" for key, value in settings_of(stripes)]
    config = ROOT / "configs" / "digits-8.toml"
    code, _, err = call("train", config, "-o", tmp_path / "whole", *words)
    assert code == 0, err
    halves = [word if "max_train" not in word else word.replace("=6", "=4") for word in words]
    more = ["--set=denoiser.training.lr_schedule=constant"]
    for run, parts in (("whole2", [words]), ("parts", [halves, words])):
        for part in parts:
            assert call("train", config, "-o", tmp_path / run, *part, *more)[0] == 0
    weights = [(tmp_path / run / "model" / "transformer").glob("*.safetensors") for run in ("whole2", "parts")]
    first, second = (next(files).read_bytes() for files in weights)
    assert first == second
    pipe = load(tmp_path / "whole" / "model")
    assert pipe.model.encoder.names == ("9", "columns", "rows")
    assert call("generate", "rows", "-m", tmp_path / "whole" / "model", "-s", "1", "-o", "rows.png")[0] == 0
    assert read_metadata(tmp_path / "rows.png")["latentdiff"]["request"]["prompt"] == "rows"
    assert call("generate", "--class", "rows", "-m", tmp_path / "whole" / "model", "-s", "1", "-o", "again.png")[0] == 0
    with Image.open(tmp_path / "rows.png") as first, Image.open(tmp_path / "again.png") as second:
        assert (np.asarray(first) == np.asarray(second)).all()
    code, _, err = call("generate", "row", "-m", tmp_path / "whole" / "model", "-o", "row.png")
    assert code == 2
    assert "this model has no class 'row' (did you mean rows?)" in err
    assert call("info", tmp_path / "whole" / "model", "--find", "")[1] == "classes: 9, columns, rows\n"
    code, _, err = call("train", config, "-o", tmp_path / "clip", *words, "--stage", "clip")
    assert code == 2
    assert "no CLIP" in err


@pytest.mark.slow
def test_it_learns(stripes, tmp_path, call):
    words = settings_of(stripes, **{"denoiser.training.max_train_steps": 600, "recommended.num_inference_steps": 10})
    assert call("train", ROOT / "configs" / "digits-8.toml", "-o", tmp_path / "run",
                *(f"--set={key}={value}" for key, value in words))[0] == 0  # fmt: skip
    image = load(tmp_path / "run" / "model")(["rows", "columns", "9"], seed=1, output_type="uint8").images[..., 0] / 255
    across, down = (np.abs(np.diff(image, axis=axis)).mean((1, 2)) for axis in (2, 1))
    assert down[0] > 0.7
    assert across[0] < 0.2
    assert across[1] > 0.7
    assert down[1] < 0.2
    assert max(across[2], down[2]) < 0.2
