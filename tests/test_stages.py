"""The stages of a run: the chain on the command line, what each leaves behind, and what is refused before it begins."""

import re
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from latentdiff.core.errors import ConfigError, DataError, ModelError
from latentdiff.data.dataset import open_data
from latentdiff.families import own
from latentdiff.families.weights import load_codec
from latentdiff.settings.config import load_config
from latentdiff.stages.autoencoder import latent_statistics
from latentdiff.stages.cache import latents_of
from latentdiff.stages.denoiser import train_denoiser
from latentdiff.stages.run import Run, _changes_shapes, check_unchanged, checkpoints_to_resume

from .conftest import ROOT
from .forked import Started, train
from .small import logged

TINY = ROOT / "configs" / "scenes-tiny.toml"


def test_the_whole_chain(tiny_run):
    """configs/scenes-tiny.toml from nothing: every stage's loss falls, previews and a loadable model are written."""
    for stage, steps in (("autoencoder", 60), ("clip", 40), ("denoiser", 40)):
        lines = logged(tiny_run / stage)
        rows, (report,) = [x for x in lines if "loss" in x], [x for x in lines if "loss" not in x]
        assert [row["step"] for row in rows] == list(range(1, steps + 1))
        assert report["step"] == steps
        losses = [row["loss"] for row in rows]
        assert np.mean(losses[-8:]) < 0.9 * np.mean(losses[:8]), stage
    assert (tiny_run / "denoiser" / "samples" / "step-00000040.png").is_file()
    assert (tiny_run / "config.toml").is_file()
    assert {path.name for path in (tiny_run / "model").iterdir()} == {
        "clip", "latentdiff.json", "model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae",
        "things.json",
        "words.txt",
    }  # fmt: skip


def test_latents_are_white(tiny_run):
    """The folded VAE gives latents of mean 0 and deviation 1 in every channel."""
    config = load_config(ROOT / "configs" / "scenes-tiny.toml")
    center, std = latent_statistics(
        load_codec(tiny_run / "model"), config, open_data(config).training, torch.device("cpu")
    )
    torch.testing.assert_close(center, torch.zeros(4), rtol=0, atol=1e-3)
    torch.testing.assert_close(std, torch.ones(4), rtol=0, atol=1e-3)


def test_a_finished_run_is_not_run_again(tiny_run):
    before = (tiny_run / "denoiser" / "log.jsonl").read_text()
    again = Started("train", ROOT / "configs" / "scenes-tiny.toml", "-o", tiny_run)
    assert again.ended()[0] == 0
    assert again.printed().strip() == str(tiny_run / "model")
    assert (tiny_run / "denoiser" / "log.jsonl").read_text() == before


@pytest.mark.parametrize("name", ["scenes-64", "scenes-tiny", "pixels-32", "pictures-64"])
def test_shipped_configs_describe_networks(name):
    own.check_networks(load_config(ROOT / "configs" / f"{name}.toml"))


@pytest.mark.parametrize(
    "change",
    [
        "autoencoder.block_out_channels=[8,-16]",
        "autoencoder.block_out_channels=[]",
        "autoencoder.norm_num_groups=3",
        "autoencoder.crop=9",
        "image_size=63",
        "clip.text_heads=3",
        "clip.patch_size=100",
        "clip.vision_head_width=64",
        "denoiser.attention=[true]",
        "denoiser.norm_num_groups=7",
    ],
)
def test_networks_that_cannot_be_are_refused_before_training(change):
    with pytest.raises(ConfigError, match=change.split("=")[0].split(".")[0]):
        own.check_networks(load_config(ROOT / "configs" / "scenes-tiny.toml", [change]))


@pytest.mark.slow
def test_pixel_space(tmp_path):
    """The identity autoencoder: the same code trains and draws small grey pictures, by the DDPM noise objective."""
    from PIL import Image

    changes = (
        "data.count=64",
        "clip.training.max_train_steps=2",
        "clip.training.train_batch_size=8",
        "denoiser.block_out_channels=[16, 16, 16]",
        "denoiser.preview_pictures=8",
        "denoiser.training.max_train_steps=30",
        "denoiser.training.train_batch_size=8",
        "denoiser.training.lr_warmup_steps=5",
        "recommended.num_inference_steps=4",
    )
    words = [word for change in changes for word in ("--set", change)]
    code, err = Started("train", ROOT / "configs" / "pixels-32.toml", "-o", tmp_path / "run", *words).ended()
    assert code == 0, err
    losses = [row["loss"] for row in logged(tmp_path / "run" / "denoiser") if "loss" in row]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    assert not (tmp_path / "run" / "model" / "vae").exists()
    words = ("generate", "a red circle", "-m", tmp_path / "run" / "model", "-s", 1, "-o", tmp_path / "one.png")
    assert Started(*words).ended()[0] == 0
    with Image.open(tmp_path / "one.png") as image:
        assert (image.size, image.mode) == ((32, 32), "L")


def unchanged(config, checkpoints, **more):
    """check_unchanged on the data that the config describes."""
    return check_unchanged(config, open_data(config), checkpoints, **more)


def latest(run):
    """The checkpoints of all stages of a run that is there."""
    result, _ = checkpoints_to_resume(run, ("autoencoder", "clip", "denoiser"), "latest")
    return result


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("denoiser.prediction=epsilon", "cannot resume: denoiser.prediction v_prediction -> epsilon. Use"),
        ("seed=7", "cannot resume: dataset changed (256 images, others than before); seed 0 -> 7. Use"),
        ("data.count=255", "cannot resume: dataset changed (256 -> 255 images). Use --allow-changed to accept"),
        ("denoiser.training.train_batch_size=32", "cannot resume: denoiser batch 8 -> 32. Use --allow-changed"),
        ("image_size=128", "cannot resume: dataset changed (256 images, others than before); image_size 64 -> 128."),
        (
            "data.mix=[1, 0, 0, 0, 1, 0]",
            "data.mix [0.24, 0.12, 0.18, 0.04, 0.3, 0.12] -> [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]. Use --allow-changed",
        ),
    ],
)
def test_a_run_does_not_go_on_under_other_settings(tiny_run, change, named):
    """Else weights of one meaning would be saved under the name of another. Each change is listed, once."""
    config = load_config(TINY, [change])
    with pytest.raises(ConfigError, match=re.escape(named)) as refused:
        unchanged(config, latest(tiny_run))
    changes = unchanged(config, latest(tiny_run), allow=True)
    assert str(refused.value).startswith(f"cannot resume: {'; '.join(changes)}. Use")


def test_what_may_change_between_starts(tiny_run):
    """How long, how often saved, how drawn; the split of a batch, not its size; what a stage without checkpoint is."""
    changes = ["denoiser.training.max_train_steps=99", "clip.training.lr_decay=0.5", "recommended.sampler=unipc"]
    changes += ["denoiser.training.train_batch_size=4", "denoiser.training.gradient_accumulation_steps=2"]
    assert unchanged(load_config(TINY, changes), latest(tiny_run)) == []
    halves = load_config(TINY, ["denoiser.training.train_batch_size=4"])
    assert unchanged(halves, {"denoiser": latest(tiny_run)["denoiser"]}, processes=2) == []
    wider = load_config(TINY, ["denoiser.block_out_channels=[32, 32, 32]"])
    assert unchanged(wider, {**latest(tiny_run), "denoiser": None}) == []


def test_the_fingerprint_sees_the_pictures(monkeypatch):
    """Not only the settings they are drawn by."""
    config = load_config(TINY)
    before = open_data(config).fingerprint
    assert before == open_data(config).fingerprint
    assert before["images"] == 256
    monkeypatch.setattr("latentdiff.data.scenes.render", lambda scene, size: np.zeros((size, size, 3), np.uint8))
    assert open_data(config).fingerprint["sha256"] != before["sha256"]


def test_where_a_start_goes_on_from(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    stages = ("autoencoder", "clip", "denoiser")
    newest = {"autoencoder": 60, "clip": 40, "denoiser": 40}
    paths = {stage: run / stage / "checkpoints" / f"step-{step:08d}" for stage, step in newest.items()}
    assert checkpoints_to_resume(run, stages, "auto") == (paths, []) == checkpoints_to_resume(run, stages, "latest")

    older = run / "clip" / "checkpoints" / "step-00000020"
    assert checkpoints_to_resume(run, stages, str(older)) == ({**paths, "clip": older}, [])
    with pytest.raises(ModelError, match="belongs to stage clip, which is not trained now"):
        checkpoints_to_resume(run, ["denoiser"], str(older))
    with pytest.raises(ModelError, match="no checkpoint folder"):
        checkpoints_to_resume(run, stages, str(tmp_path / "nowhere"))

    aside = shutil.copytree(paths["denoiser"], run / "denoiser" / "checkpoints" / "aside-1-step-00000040")
    damaged = paths["denoiser"] / "unet.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    result, notes = checkpoints_to_resume(run, stages, "latest")
    assert result["denoiser"].name == "step-00000020"
    assert re.fullmatch(
        r"warning: checkpoint step-40 is damaged \(unet.safetensors: [\d,]+ of [\d,]+ bytes\); using step-20", notes[0]
    )
    with pytest.raises(ModelError, match=r"step-00000040 is damaged \(unet.safetensors: .* bytes\)"):
        checkpoints_to_resume(run, stages, str(paths["denoiser"]))
    (result["denoiser"] / "MANIFEST.json").unlink()
    with pytest.raises(ModelError, match=r"step-40 is damaged .* and none of .* is whole"):
        checkpoints_to_resume(run, stages, "auto")
    assert checkpoints_to_resume(run, stages, str(aside)) == ({**paths, "denoiser": aside}, []), "a whole one by name"


@pytest.mark.parametrize(
    ("key", "old", "new", "changes_shapes"),
    [
        ("denoiser.enlarging.scale", 1, 4, True),
        ("denoiser.enlarging.scale", 2, 4, False),
        ("denoiser.editing.source", "", "before", True),
        ("denoiser.editing.source", "a", "b", False),
        ("denoiser.editing.source", "a -> ", "b", False),
        ("consistency.objective", "lcm", "ect", False),
        ("consistency.objective", "lcm", "mean-flow", True),
        ("consistency.guidance_range", None, [2.0, 12.0], True),
        ("consistency.guidance_range", [1.0, 8.0], [1.0, 10.0], False),
        ("denoiser.inpainting", False, True, True),
        ("clip.merges", 4000, 5000, True),
        ("denoiser.training.seed", 0, 1, False),
    ],
)
def test_changes_of_shapes(key, old, new, changes_shapes):
    assert _changes_shapes(key, old, new) is changes_shapes


def test_nothing_to_go_on_from(tmp_path):
    where = re.escape(str(tmp_path / "denoiser" / "checkpoints"))
    with pytest.raises(ModelError, match=rf"no checkpoint in {where}\. Use --resume auto to start fresh"):
        checkpoints_to_resume(tmp_path, ["denoiser"], "latest")
    result, notes = checkpoints_to_resume(tmp_path, ["denoiser"], "auto")
    assert result == {"denoiser": None}
    assert re.fullmatch(rf"a new run: no checkpoint in {where}", notes[0])


@pytest.mark.parametrize("stage", ["autoencoder", "clip"])
def test_the_denoiser_needs_the_stages_before(tiny_run, tmp_path, stage):
    shutil.copytree(tiny_run / "model" / "vae", tmp_path / "model" / "vae")
    shutil.copytree(tiny_run / "clip", tmp_path / "clip")
    shutil.rmtree(tmp_path / ("model" if stage == "autoencoder" else "clip"))
    with pytest.raises(ConfigError, match=f"the denoiser requires the {stage} of the same run"):
        train_denoiser(
            Run(load_config(TINY), tmp_path, Accelerator(cpu=True), open_data(load_config(TINY)), {"denoiser": None})
        )


@pytest.mark.parametrize("cut", [True, False], ids=["cut off", "one bit"])
def test_cached_latents_that_cannot_be_read_are_named(tiny_run, tmp_path, cut):
    config = load_config(TINY)
    shutil.copytree(tiny_run / "cache", tmp_path / "cache")
    file = next((tmp_path / "cache").glob("latents-*/*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content[:-10] if cut else content)
    examples, autoencoder = open_data(config).training, load_codec(tiny_run / "model")
    with pytest.raises(DataError, match=f"cached rows are damaged .*{file.name}"):
        latents_of(config.denoiser, [examples], autoencoder, tmp_path / "cache", Accelerator(cpu=True))


def planned(run, *changes):
    """What `train --dry-run` of a run says on standard error, and its exit code."""
    code, err = train(run, "--dry-run", changes=changes).ended()
    return code, err


def test_a_longer_schedule_is_said(whole):
    """A warning says what to do if the learning rate would jump back up; an unchanged schedule has none."""
    code, err = planned(whole, "denoiser.training.max_train_steps=100")
    assert code == 0
    (line,) = [line for line in err.splitlines() if line.startswith("warning: denoiser goes on at a learning rate of ")]
    assert " at step 13: its schedule ends later now. To go on as low, lower denoiser.training.learning_rate" in line
    assert "goes on at" not in planned(whole)[1]


def test_other_shapes_cannot_be_allowed(whole):
    """--allow-changed could not help: the message does not offer it."""
    for change in ("denoiser.layers_per_block=2", "clip.text_width=96"):
        code, err = planned(whole, change)
        assert code == 2
        assert "The weights have other shapes: name another folder" in err
        assert "allow-changed" not in err
