"""Model folders that are refused: damaged, hostile or incomplete, each with its exit code and one line."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentdiff import LatentDiffusionPipeline
from latentdiff.core.errors import ModelError, NonFiniteError, UnsafeError

from .conftest import loosened


class Canary:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        from pathlib import Path

        return Path.touch, (self.path,)


@pytest.fixture
def folder(tiny_model, tmp_path):
    return loosened(shutil.copytree(tiny_model, tmp_path / "model"))


def refusal(folder, kind):
    with pytest.raises(kind) as caught:
        LatentDiffusionPipeline.from_pretrained(folder)
    assert type(caught.value) is kind
    return str(caught.value)


@pytest.mark.parametrize(
    "name", ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin", "w.SafeTensors", "w.ckpt", "w.model"]
)
@pytest.mark.parametrize("archive", [False, True])
def test_pickles_are_refused_by_content(folder, tmp_path, name, archive):
    """As the weights of a part, and under the name of safetensors anywhere."""
    canary, path = tmp_path / "canary", folder / "unet" / name
    if name != "w.SafeTensors":
        (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    save_pickle(canary, path, archive)
    assert f"unet/{name} is a pickle file" in refusal(folder, UnsafeError)
    assert not canary.exists()


def save_pickle(canary, path, archive):
    if archive:
        torch.save(Canary(canary), path)
    else:
        path.write_bytes(pickle.dumps(Canary(canary)))


def test_pickles_beside_safetensors_are_never_opened(folder, tmp_path):
    """Many published models have both, and what a trainer saved; the picture is that of the safetensors."""
    before = LatentDiffusionPipeline.from_pretrained(folder, device="cpu")
    for name in (
        "unet/diffusion_pytorch_model.bin",
        "text_encoder/pytorch_model.bin",
        "v1.ckpt",
        "random_states_0.pkl",
    ):
        save_pickle(tmp_path / "canary", folder / name, archive=name.endswith(".bin"))
    (folder / ".metadata").write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    after = LatentDiffusionPipeline.from_pretrained(folder, device="cpu")
    assert after.card == before.card
    for name, tensor in before.model.backbone.state_dict().items():
        assert torch.equal(after.model.backbone.state_dict()[name], tensor)
    assert not (tmp_path / "canary").exists()


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_remote_code_is_refused(folder):
    edit(folder / "text_encoder" / "config.json", auto_map={"AutoModel": "evil.Model"})
    assert refusal(folder, UnsafeError) == (
        "model directory asks to run code (auto_map in text_encoder/config.json). latentdiff never does this"
    )


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "quantization_config"])
def test_code_of_other_packages_is_refused(folder, key):
    """A kernel of the hub, a quantizer's loader."""
    edit(folder / "text_encoder" / "config.json", **{key: "evil/kernel"})
    assert f"asks to run code ({key}" in refusal(folder, UnsafeError)


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("unet", {"layers_per_block": 999, "transformer_layers_per_block": 999}),
        ("unet", {"layers_per_block": -1}),
        ("unet", {"layers_per_block": [1.5, 1]}),
        ("unet", {"reverse_transformer_layers_per_block": [[900, 900], [900, 1]]}),
        ("unet", {"block_out_channels": [32] * 50_000, "down_block_types": ["DownBlock2D"] * 50_000}),
        ("vae", {"layers_per_block": 900}),
        ("text_encoder", {"num_hidden_layers": 900}),
    ],
    ids=range(7),
)
def test_more_layers_than_there_are_weights(folder, part, changes):
    """Refused before any layer is made: each would take time, even without memory."""
    edit(folder / part / "config.json", **changes)
    assert f"{part}/config.json" in refusal(folder, ModelError)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool])
def test_weights_that_are_no_floating_point(folder, dtype):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    rewrite(path, lambda state: state.update({name: tensor.to(dtype) for name, tensor in state.items()}))
    assert "weights must be floats of 16 bits or more" in refusal(folder, ModelError)


def test_a_schedule_that_does_not_fall(folder):
    edit(folder / "scheduler" / "scheduler_config.json", trained_betas=[1.0] * 1000)
    assert "no noise schedule" in refusal(folder, ModelError)


def test_a_tokenizer_of_other_words(folder):
    edit(folder / "tokenizer" / "tokenizer_config.json", pad_token="<nowhere>")
    refusal(folder, ModelError)


def test_program_in_the_folder_is_refused(folder):
    (folder / "pipeline.py").write_text("raise SystemExit")
    assert "asks to run code (pipeline.py)" in refusal(folder, UnsafeError)


@pytest.mark.parametrize("name", ["Model", ["UNet2DConditionModel"]], ids=str)
def test_unknown_class_is_refused(folder, name):
    edit(folder / "model_index.json", unet=["evil", name])
    assert f"unet has the unknown class {name}" in refusal(folder, UnsafeError)


@pytest.mark.parametrize("value", [0, -16, 16.7, True, [16, 16], None], ids=str)
def test_sample_size_that_is_no_number_of_latents(folder, value):
    (folder / "latentdiff.json").unlink()
    edit(folder / "unet" / "config.json", sample_size=value)
    assert "sample_size must be a whole number of latents" in refusal(folder, ModelError)


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


def rewrite(path, change):
    """Change the tensors of a safetensors file."""
    state = load_file(path)
    change(state)
    save_file(state, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("part", "file", "name"),
    [
        ("text_encoder", "model", "encoder.layers.0.mlp.fc1.weight"),
        ("text_encoder", "model", "embeddings.position_embedding.weight"),
        ("unet", "diffusion_pytorch_model", "conv_out.weight"),
        ("vae", "diffusion_pytorch_model", "decoder.conv_in.bias"),
    ],
)
def test_a_weight_that_is_not_there_is_not_made_up(folder, part, file, name):
    rewrite(folder / part / f"{file}.safetensors", lambda state: state.pop(name))
    assert f"{part}: 1 weights are missing, the first is {name}" in refusal(folder, ModelError)


def test_weights_that_nothing_uses_are_told(folder):
    rewrite(folder / "unet" / "diffusion_pytorch_model.safetensors", lambda state: state.update(odd=torch.zeros(1)))
    with pytest.warns(UserWarning, match="unet: 1 weights belong to no layer, the first is odd"):
        LatentDiffusionPipeline.from_pretrained(folder)


def test_a_config_that_asks_for_more_than_the_weights(folder):
    config = folder / "unet" / "config.json"
    width = json.loads(config.read_text())["cross_attention_dim"]
    edit(config, encoder_hid_dim=width, encoder_hid_dim_type="text_proj")
    assert "weights are missing, the first is encoder_hid_proj.bias" in refusal(folder, ModelError)


def test_a_unet_of_classes(folder):
    edit(folder / "unet" / "config.json", num_class_embeds=4)
    assert "1 weights are missing, the first is class_embedding.weight" in refusal(folder, ModelError)


def test_vae_of_not_a_number(folder):
    """The latents are finite, the picture is not."""
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    rewrite(path, lambda state: state["decoder.conv_out.bias"].fill_(float("nan")))
    pipe = LatentDiffusionPipeline.from_pretrained(folder, device="cpu")
    with pytest.raises(NonFiniteError, match="decoding gave non-finite"):
        pipe("a red circle", num_inference_steps=1)


@pytest.mark.parametrize("value", [0.0, -1.0, "x", None])
def test_scaling_factor(folder, value):
    edit(folder / "vae" / "config.json", scaling_factor=value)
    refusal(folder, ModelError)


def test_tokenizer_is_not_made_up(folder):
    shutil.rmtree(folder / "tokenizer")
    assert "tokenizer/tokenizer.json or vocab.json is missing" in refusal(folder, ModelError)


@pytest.mark.parametrize("length", [77, 0, "x"])
def test_tokenizer_that_reads_more_than_the_encoder(folder, length):
    edit(folder / "tokenizer" / "tokenizer_config.json", model_max_length=length)
    refusal(folder, ModelError)


def test_linked_folder_is_refused(folder, tmp_path):
    """What a link leads to would be loaded without having been looked at."""
    shutil.move(folder / "unet", tmp_path / "elsewhere")
    (folder / "unet").symlink_to(tmp_path / "elsewhere")
    assert "unet is a link to a folder" in refusal(folder, UnsafeError)


def test_dangling_link_is_refused(folder):
    (folder / "readme.txt").symlink_to("nowhere")
    assert "readme.txt is not a file" in refusal(folder, ModelError)


def test_no_vae_and_latents_of_four_channels(folder):
    edit(folder / "model_index.json", vae=[None, None])
    shutil.rmtree(folder / "vae")
    assert "a U-Net of 4 channels requires a vae" in refusal(folder, ModelError)


@pytest.mark.parametrize("tree", [[], None, 3, "x"])
@pytest.mark.parametrize(
    "name", ["model_index.json", "scheduler/scheduler_config.json", "latentdiff.json", "unet/config.json"]
)
def test_json_that_is_no_object(folder, name, tree):
    (folder / name).write_text(json.dumps(tree))
    assert "is not a JSON object" in refusal(folder, ModelError)


@pytest.mark.parametrize(
    "changes",
    [{"num_train_timesteps": value} for value in ("abc", -5, 0, 1, None, [1000], float("nan"), 1e12, 10**9)]
    + [{"beta_start": value, "trained_betas": None} for value in ("x", None, 7.0)]
    + [{"trained_betas": value} for value in ([0.1, 0.2], "abc", [[0.1] * 1000], [2.0] * 1000, [float("nan")] * 1000)],
    ids=str,
)
def test_scheduler_of_impossible_values(folder, changes):
    edit(folder / "scheduler" / "scheduler_config.json", **changes)
    assert len(refusal(folder, ModelError)) < 500


@pytest.mark.parametrize(
    "changes",
    [{"size": value} for value in ("64", [64], ["a", "b"], None, [0, 0], [-64, -64], [65, 65])]
    + [{"defaults": value} for value in ([1], {"prompt": "x"}, {"sampler": "bogus"}, {"num_inference_steps": 5000})]
    + [{"name": 5}, {"name": ""}, {"more": 1}],
    ids=str,
)
def test_card_of_impossible_values(folder, changes):
    edit(folder / "latentdiff.json", **changes)
    assert "latentdiff.json" in refusal(folder, ModelError)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is only a pointer of Git LFS"),
        ("<!DOCTYPE html><html>not found</html>", "is not a safetensors file"),
    ],
)
def test_what_a_download_leaves_in_place_of_weights(folder, text, message):
    path = next((folder / "vae").glob("*.safetensors"))
    path.write_text(text)
    refused = refusal(folder, ModelError)
    assert f"{path.name} {message}" in refused, refused


@pytest.mark.parametrize("size", [0, 5, 1000])
def test_truncated_weights_are_no_pickle(folder, size):
    from latentdiff.formats.folder import parameter_counts

    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert "cannot load unet" in refusal(folder, ModelError)
    with pytest.raises(ModelError, match="cannot load unet"):
        parameter_counts(folder)


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
    assert (
        "prediction_type: must be 'epsilon', 'sample', 'v_prediction', 'flow', 'flow_prediction' or 'karras'"
        in refusal(folder, ModelError)
    )
