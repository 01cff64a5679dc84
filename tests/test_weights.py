"""Model folders that are refused: damaged, hostile or incomplete, each with its exit code and one line."""

import json
import pickle
import shutil

import pytest
import torch

from latentdiff import LatentDiffusionPipeline
from latentdiff.errors import ModelError, UnsafeError


class Canary:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        from pathlib import Path

        return Path.touch, (self.path,)


@pytest.fixture
def folder(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


def refusal(folder, kind):
    with pytest.raises(kind) as caught:
        LatentDiffusionPipeline.from_pretrained(folder)
    assert type(caught.value) is kind
    return str(caught.value)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin", "extra.ckpt"])
@pytest.mark.parametrize("archive", [False, True])
def test_pickles_are_refused_by_content(folder, tmp_path, name, archive):
    canary, path = tmp_path / "canary", folder / "unet" / name
    if archive:
        torch.save(Canary(canary), path)
    else:
        path.write_bytes(pickle.dumps(Canary(canary)))
    assert f"unet/{name} is a pickle file" in refusal(folder, UnsafeError)
    assert not canary.exists()


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_remote_code_is_refused(folder):
    edit(folder / "text_encoder" / "config.json", auto_map={"AutoModel": "evil.Model"})
    assert refusal(folder, UnsafeError) == (
        "model directory asks to run code (auto_map in text_encoder/config.json). latentdiff never does this"
    )


def test_program_in_the_folder_is_refused(folder):
    (folder / "pipeline.py").write_text("raise SystemExit")
    assert "asks to run code (pipeline.py)" in refusal(folder, UnsafeError)


def test_unknown_class_is_refused(folder):
    edit(folder / "model_index.json", unet=["evil", "Model"])
    assert "unet is of unknown class Model" in refusal(folder, UnsafeError)


@pytest.mark.parametrize(
    ("part", "key", "value"), [("unet", "cross_attention_dim", 10**9), ("text_encoder", "num_hidden_layers", 5000)]
)
def test_absurd_number_is_refused(folder, part, key, value):
    edit(folder / part / "config.json", **{key: value})
    assert f"{key} = {value} is absurd" in refusal(folder, ModelError)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("unet", {"block_out_channels": [131072] * 3}),
        ("vae", {"norm_num_groups": 1, "block_out_channels": [131072] * 2}),
        ("text_encoder", {"vocab_size": 199_936}),
    ],
)
def test_a_config_larger_than_its_weights_takes_no_memory(folder, part, change):
    """Each number is a possible one; together they would ask for terabytes."""
    edit(folder / part / "config.json", **change)
    assert f"{part}/config.json describes" in refusal(folder, ModelError)


def test_truncated_weights(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "cannot load unet" in refusal(folder, ModelError)


@pytest.mark.parametrize(
    "name",
    [
        "unet/config.json",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ],
)
def test_missing_file(folder, name):
    (folder / name).unlink()
    refusal(folder, ModelError)


def test_config_that_is_not_json(folder):
    (folder / "vae" / "config.json").write_text("{")
    assert "vae/config.json is not valid JSON" in refusal(folder, ModelError)


def test_unknown_prediction(folder):
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type="magic")
    assert "unknown prediction_type 'magic'" in refusal(folder, ModelError)
