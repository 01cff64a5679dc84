"""Single files as people have them: of other kinds, without parts, averages alone; and what one cannot express."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

from latentdiff import LatentDiffusionPipeline
from latentdiff.core.errors import ConfigError, ModelError
from latentdiff.families.original import save_single_file
from latentdiff.formats.original import EMA, UNET, VAE
from latentdiff.networks.codecs.kl import KLAutoencoder

from .stable_diffusion import load, stored

PROMPT = "a castle on a hill"
OPTIONS = {"num_inference_steps": 2, "width": 64, "height": 64, "seed": 1, "output_type": "latent", "sampler": "ddim"}


@pytest.fixture(scope="module")
def files(folders, tmp_path_factory):
    """A tiny model of each family as a single file."""
    place = tmp_path_factory.mktemp("single")
    for family, folder in folders.items():
        save_single_file(stored(folder).model, place / f"{family}.safetensors")
    return place


def changed(file, target, change, metadata=None):
    """The file with its tensors changed, at another path."""
    save_file(change(load_file(file)), target, metadata)
    return target


def opened(path, **settings):
    return LatentDiffusionPipeline.from_pretrained(path, device="cpu", **settings)


def test_float8_with_scales(files, tmp_path):
    """ComfyUI's scaled files: the U-Net's matrices are products of float8 and one number each."""
    state = load_file(files / "1.safetensors")
    expected = dict(state)
    for name in [name for name, tensor in state.items() if name.startswith(UNET) and tensor.ndim == 2]:
        factor = state[name].abs().max() / 448
        state[name] = (expected[name] / factor).to(torch.float8_e4m3fn)
        expected[name] = (state[name].float() * factor).bfloat16()
        state[name.replace("weight", "scale_weight")] = factor
    save_file(state | {"scaled_fp8": torch.zeros(2)}, tmp_path / "scaled.safetensors")
    save_file(expected, tmp_path / "expected.safetensors")
    scaled, plain = (
        opened(tmp_path / f"{name}.safetensors")(PROMPT, **OPTIONS).images for name in ("scaled", "expected")
    )
    assert torch.equal(scaled, plain)


@pytest.mark.parametrize("family", [*(pytest.param(each, marks=pytest.mark.slow) for each in ("1", "2")), "XL"])
def test_averages_alone(family, files, folders, tmp_path):
    """`model_ema.` and names without dots, no other U-Net: drawn as the same weights under their own names."""

    def averages(state):
        return {
            EMA + name.removeprefix(UNET).replace(".", "") if name.startswith(UNET) else name: tensor
            for name, tensor in state.items()
        } | {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(5)}

    file = changed(files / f"{family}.safetensors", tmp_path / "ema.safetensors", averages)
    picture, expected = (opened(path)(PROMPT, **OPTIONS).images for path in (file, files / f"{family}.safetensors"))
    assert torch.equal(picture, expected)


def test_averages_beside_the_weights(files, tmp_path):
    """The weights are read, and no flag of another library's script is advised."""

    def both(state):
        named = {name: tensor for name, tensor in state.items() if name.startswith(UNET)}
        return state | {EMA + name.removeprefix(UNET).replace(".", ""): 0 * tensor for name, tensor in named.items()}

    file = changed(files / "1.safetensors", tmp_path / "both.safetensors", both)
    expected = opened(files / "1.safetensors")(PROMPT, **OPTIONS).images
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    theirs = logging.getLogger("diffusers.loaders.single_file_utils")
    theirs.addHandler(handler)
    try:
        assert torch.equal(opened(file)(PROMPT, **OPTIONS).images, expected)
    finally:
        theirs.removeHandler(handler)
    assert not messages


def without_vae(state):
    return {name: tensor for name, tensor in state.items() if not name.startswith(VAE)}


def vae_alone(state):
    return {name.removeprefix(VAE): tensor for name, tensor in state.items() if name.startswith(VAE)}


def test_a_checkpoint_without_vae(files, folders, tmp_path, call):
    """It draws latents, says what it needs for pictures, and takes any VAE: a folder, a file, a checkpoint."""
    bare = changed(files / "1.safetensors", tmp_path / "bare.safetensors", without_vae)
    alone = changed(files / "1.safetensors", tmp_path / "vae.safetensors", vae_alone)
    whole = opened(files / "1.safetensors")
    pipe = opened(bare)
    assert torch.equal(pipe(PROMPT, **OPTIONS).images, whole(PROMPT, **OPTIONS).images)
    for act in (lambda: pipe(PROMPT, **OPTIONS | {"output_type": "pt"}), lambda: pipe.save_pretrained(tmp_path / "x")):
        with pytest.raises(ModelError, match=r"this checkpoint has no VAE\. Name one: --vae, load_vae"):
            act()
    assert not (tmp_path / "x").exists()
    expected = whole(PROMPT, **OPTIONS | {"output_type": "pt"}).images
    for vae in (folders["1"], alone, files / "1.safetensors"):
        one = opened(bare)
        one.load_vae(vae)
        torch.testing.assert_close(one(PROMPT, **OPTIONS | {"output_type": "pt"}).images, expected, rtol=0, atol=1e-6)
    words = ("generate", PROMPT, "-m", bare, "--vae", alone, "--steps", 2, "-W", 64, "-H", 64, "-s", 1)
    assert call(*words, "-o", "a.png")[0] == 0
    code, out, _ = call("reproduce", "a.png", "-m", bare, "--source", alone)
    assert (code, out.startswith("equal")) == (0, True)
    code, _, err = call(*words[:4], *words[6:], "-o", "b.png")
    assert (code, err) == (4, "error: this checkpoint has no VAE. Name one: --vae, load_vae\n")


def decoder_alone(state):
    return {name: tensor for name, tensor in vae_alone(state).items() if not name.startswith("encoder.")}


def test_a_vae_without_an_encoder(files, tmp_path):
    """It decodes as the whole one does; what requires an encoder says so, and nothing is written without one."""
    decoder = changed(files / "1.safetensors", tmp_path / "decoder.safetensors", decoder_alone)
    whole, pipe = opened(files / "1.safetensors"), opened(files / "1.safetensors")
    pipe.load_vae(decoder)
    options = OPTIONS | {"output_type": "pt"}
    assert torch.equal(pipe(PROMPT, **options).images, whole(PROMPT, **options).images)
    with pytest.raises(ModelError, match="this VAE has no encoder, which input pictures require"):
        pipe(PROMPT, image=Image.new("RGB", (64, 64)), **OPTIONS | {"strength": 1.0})
    with pytest.raises(ConfigError, match="a model folder requires a complete VAE; this one has no encoder"):
        pipe.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_vae_of_eight_bits(files, tmp_path, call):
    """It is widened when it is read, so that what is converted with it can be read again."""

    def narrow(state):
        return {name: tensor.to(torch.float8_e4m3fn) for name, tensor in vae_alone(state).items()}

    vae = changed(files / "1.safetensors", tmp_path / "f8.safetensors", narrow)
    assert call("convert", files / "1.safetensors", "folder", "--vae", vae)[0] == 0
    picture = opened("folder")(PROMPT, **OPTIONS | {"output_type": "pt"}).images
    expected = opened(files / "1.safetensors")(PROMPT, **OPTIONS | {"output_type": "pt"}).images
    assert 0 < float((picture.float() - expected).abs().mean()) < 0.05


def encoder_alone(state):
    return {name: tensor for name, tensor in state.items() if not name.startswith(f"{VAE}decoder")}


def test_a_checkpoint_whose_vae_has_no_decoder(files, tmp_path):
    file = changed(files / "1.safetensors", tmp_path / "half.safetensors", encoder_alone)
    with pytest.raises(ModelError, match="its VAE has no decoder"):
        opened(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {"x": torch.zeros(1)}, "there is no VAE in it"),
        (lambda state: {"decoder.up_blocks.0.x": torch.zeros(1)}, "diffusers' names without their config"),
    ],
)
def test_vae_files_that_lack_something(change, message, files, tmp_path):
    file = changed(files / "1.safetensors", tmp_path / "vae.safetensors", change)
    with pytest.raises(ModelError, match=message):
        opened(files / "1.safetensors").load_vae(file)


# other kinds


@pytest.mark.parametrize(
    ("name", "kind"),
    [("edm_vpred.sigma_max", "CosXL"), ("edm_mean", "Playground 2.5"), ("edm_std", "Playground 2.5")],
)
def test_models_of_another_path_are_refused_by_name(name, kind, files, tmp_path):
    file = changed(files / "XL.safetensors", tmp_path / "x.safetensors", lambda s: s | {name: torch.zeros(4)})
    with pytest.raises(ModelError, match=f"{kind} is not supported"):
        opened(file)


@pytest.mark.parametrize(
    ("metadata", "prediction"),
    [
        ({"modelspec.prediction_type": "v"}, "v_prediction"),
        ({"modelspec.prediction_type": "v-prediction"}, "v_prediction"),
        ({"prediction_type": "v_prediction"}, "v_prediction"),
        ({"ss_v_parameterization": "True"}, "v_prediction"),
        ({"ss_v_parameterization": "False"}, "epsilon"),
        ({"modelspec.prediction_type": "epsilon"}, "epsilon"),
        ({"prediction_type": "eps"}, "epsilon"),
        ({"prediction_type": "sample"}, "sample"),
        ({}, "epsilon"),
    ],
)
def test_predictions_in_metadata(metadata, prediction, files, tmp_path):
    file = changed(files / "XL.safetensors", tmp_path / "x.safetensors", lambda s: s, metadata)
    assert opened(file).model.prediction == prediction


@pytest.mark.slow
def test_a_prediction_that_is_named_by_hand(files, tmp_path, call):
    """A file that says something unknown is not drawn, unless the user says what it predicts; pictures record that."""
    file = changed(files / "1.safetensors", tmp_path / "x.safetensors", lambda s: s, {"prediction_type": "magic"})
    with pytest.raises(ConfigError, match=r"say that it predicts 'magic'\. Set prediction to one of epsilon, sample"):
        opened(file)(PROMPT, **OPTIONS)
    plain = opened(files / "1.safetensors")
    for prediction in ("epsilon", "v_prediction", "sample"):
        picture = opened(file)(PROMPT, prediction=prediction, **OPTIONS)
        expected = plain.model
        plain._revise(prediction=prediction)
        assert torch.equal(picture.images, plain(PROMPT, **OPTIONS).images)
        plain._revise(prediction=expected.prediction)
    words = ("generate", PROMPT, "-m", file, "--steps", 2, "-W", 64, "-H", 64, "-s", 1)
    assert call(*words, "--set", "prediction=v_prediction", "-o", "a.png")[0] == 0
    code, out, _ = call("reproduce", "a.png", "-m", file)
    assert (code, out.startswith("equal")) == (0, True)
    code, _, err = call(*words, "--set", "prediction=velocity", "-o", "b.png")
    assert (code, "unknown prediction 'velocity'; one of epsilon, sample, v_prediction" in err) == (2, True)
    assert call("convert", file, "right", "--prediction", "v_prediction")[0] == 0
    assert opened("right").model.prediction == "v_prediction"
    code, _, err = call("convert", file, "wrong")
    assert (code, "predicts 'magic'" in err, Path("wrong").exists()) == (2, True, False)


# what a file cannot say


@pytest.mark.parametrize(
    ("family", "part", "changes", "message"),
    [
        ("1", "unet", {"attention_head_dim": [2, 4]}, "U-Net computes"),
        ("XL", "unet", {"attention_head_dim": [1, 2, 2]}, "U-Net computes"),
        ("1", "unet", {"norm_eps": 1e-3}, "norm_eps of its U-Net"),
        ("1", "text_encoder", {"num_attention_heads": 2}, "how many heads its text encoder has"),
        ("1", "vae", {"act_fn": "relu"}, "VAE computes"),
        ("1", "unet", {"flip_sin_to_cos": False}, "that flip_sin_to_cos of its U-Net is False"),
        ("XL", "unet", {"freq_shift": 1}, "that freq_shift of its U-Net is 1"),
        ("1", "unet", {"mid_block_scale_factor": 2.0}, "mid_block_scale_factor"),
        ("1", "unet", {"center_input_sample": True}, "center_input_sample"),
        ("1", "text_encoder", {"layer_norm_eps": 1e-3}, "epsilon of its text encoder's norms"),
        ("1", "vae", {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 1.0, 1.0, 1.0]}, "latents_mean"),
    ],
)
def test_what_a_single_file_cannot_say(family, part, changes, message, folders, tmp_path, call):
    """Refused when it is written: the picture would change, or nothing could read it."""
    folder = shutil.copytree(folders[family], tmp_path / "model")
    path = folder / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    code, _, err = call("convert", folder, tmp_path / "x.safetensors")
    assert (code, message in err) == (2, True), err
    assert not (tmp_path / "x.safetensors").exists()


# folders of wrong configs


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("model_index.json", {"unet": [["diffusers"], "UNet2DConditionModel"]}),
        ("model_index.json", {"vae": ["diffusers", {"a": 1}]}),
        ("model_index.json", {"scheduler": [{}, {}]}),
        ("unet/config.json", {"freq_shift": "x"}),
        ("unet/config.json", {"downsample_padding": "x"}),
        ("unet/config.json", {"mid_block_scale_factor": "x"}),
        ("unet/config.json", {"norm_num_groups": 32.0}),
        ("unet/config.json", {"attention_head_dim": "8"}),
        ("unet/config.json", {"attention_head_dim": [8.5, 8]}),
        ("unet/config.json", {"cross_attention_dim": 63}),
        ("unet/config.json", {"center_input_sample": "x", "act_fn": 5}),
        ("text_encoder/config.json", {"eos_token_id": "x"}),
        ("text_encoder/config.json", {"num_attention_heads": 7}),
        ("text_encoder/config.json", {"num_attention_heads": "x"}),
        ("text_encoder/config.json", {"hidden_act": 5}),
        ("text_encoder/config.json", {"num_hidden_layers": 0}),
        ("tokenizer/tokenizer_config.json", {"pad_token": 5}),
        ("tokenizer/tokenizer_config.json", {"pad_token": ["a"]}),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 0}),
        ("tokenizer/tokenizer_config.json", {"model_max_length": "x"}),
        ("vae/config.json", {"up_block_types": ["UpDecoderBlock2D", "Magic", "UpDecoderBlock2D", "UpDecoderBlock2D"]}),
        ("vae/config.json", {"up_block_types": 5}),
        ("vae/config.json", {"norm_num_groups": 7}),
        ("vae/config.json", {"scaling_factor": [1]}),
    ],
)
def test_configs_of_wrong_types_are_one_line(file, changes, folders, tmp_path, call):
    """Found before a weight is read or a picture is begun; a value that a library takes anyway draws."""
    folder = shutil.copytree(folders["1"], tmp_path / "sd")
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    code, out, err = call("generate", "a", "-m", folder, "--steps", 1, "-W", 64, "-H", 64, "-o", "x.png")
    assert code in (0, 4, 7), err
    assert (out if code == 0 else err).count("\n") == 1


@pytest.mark.parametrize("width", [0, 8, 128])
def test_sizes_of_sdxl_that_do_not_fit(width, folders, tmp_path, call):
    folder = shutil.copytree(folders["XL"], tmp_path / "sd")
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"addition_time_embed_dim": width}))
    code, _, err = call("generate", "a", "-m", folder, "--steps", 1, "-W", 64, "-H", 64, "-o", "x.png")
    assert (code, err.count("\n")) == (4, 1)


def test_numbers_of_many_digits(folders, tmp_path, call):
    folder = shutil.copytree(folders["1"], tmp_path / "sd")
    for name in ("unet/config.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"):
        path = folder / name
        before = path.read_text()
        path.write_text(before.replace("{", '{"odd": ' + "9" * 5000 + ",", 1))
        code, _, err = call("generate", "a", "-m", folder, "--steps", 1, "-W", 64, "-H", 64, "-o", f"{path.stem}.png")
        assert code in (0, 4), err
        assert len(err) < 600
        path.write_text(before)


@pytest.mark.parametrize("part", ["backbone", "codec", "encoder", "text_encoder"])
def test_an_export_that_lacks_a_fact(part, compiled_model, tmp_path, call):
    """Any key of export.json, missing or of another type."""
    folder = shutil.copytree(compiled_model, tmp_path / "model")
    path = folder / "openvino" / "export.json"
    content = path.read_text()
    for key in _part_of(json.loads(content), part).keys() - {"largest", "side"}:  # which may be null
        for change in ({}, {key: None}):
            whole = json.loads(content)
            facts = _part_of(whole, part)
            del facts[key]
            facts |= change
            path.write_text(json.dumps(whole))
            with pytest.raises(ModelError, match="an export whose facts were changed"):
                opened(folder, runtime="openvino")


def _part_of(record, part):
    return record["texts"][part] if part in record["texts"] else record[part]


def test_a_layout_that_only_a_folder_has(folders):
    """Learnt words stay out of single files, as before."""
    pipe = load(folders["1"])
    pipe.model.encoder.tokenizer.add_tokens(["<x>"])
    with pytest.raises(ConfigError, match="cannot hold learnt words"):
        save_single_file(pipe.model, "nowhere.safetensors")


def test_networks_that_a_reader_could_not_build(folders, tmp_path):
    """Norms of 8 groups over 16 channels: readers assume 32 groups, and no such network exists."""
    model = load(folders["1"]).model
    vae = AutoencoderKL(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
    )
    other = replace(model, codec=KLAutoencoder(vae))
    with pytest.raises(ConfigError, match="a single file cannot describe this model"):
        save_single_file(other, tmp_path / "a.safetensors")
