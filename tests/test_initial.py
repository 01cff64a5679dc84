"""`denoiser.initial`: a training that begins with the networks of a finished model."""

import pytest
from safetensors.torch import load_file

from latentdiff import LatentDiffusionPipeline

from .forked import train

# of the tiny model's size, with a rate that changes no weight
UNCHANGED = ("image_size=64", "denoiser.training.max_train_steps=2", "denoiser.training.learning_rate=1e-30")


def weights_of(model):
    return {
        f"{part}.{name}": tensor
        for part in ("unet", "vae", "text_encoder")
        for file in (model / part).glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def test_it_begins_with_the_networks_of_the_model(tiny_model, tmp_path):
    """A run that changes nothing ends with the model's weights, to the bit; its only stage is the denoiser."""
    run = tmp_path / "run"
    code, err = train(run, changes=(*UNCHANGED, f'denoiser.initial="{tiny_model}"')).ended()
    assert code == 0, err
    assert "autoencoder:" not in err
    before, after = weights_of(tiny_model), weights_of(run / "model")
    assert before.keys() == after.keys()
    assert all((before[name] == after[name]).all() for name in before)
    ours, theirs = (LatentDiffusionPipeline.from_pretrained(each, device="cpu") for each in (run / "model", tiny_model))
    pictures = [pipe("a red circle", seed=1, num_inference_steps=2, output_type="np").images for pipe in (ours, theirs)]
    assert (pictures[0] == pictures[1]).all()
    assert (run / "model" / "clip").is_dir()


@pytest.mark.parametrize(
    ("changes", "words", "message"),
    [
        (("denoiser.layers_per_block=2",), (), "denoiser.initial: the U-Net of"),
        ((), ("--stage", "clip"), "has an autoencoder and CLIP. Only the denoiser is trained"),
        (('denoiser.initial="nowhere"',), (), "no such model"),
    ],
)
def test_what_cannot_begin(tiny_model, tmp_path, changes, words, message):
    changes = (*UNCHANGED, f'denoiser.initial="{tiny_model}"', *changes)
    code, err = train(tmp_path / "run", *words, changes=changes).ended()
    assert (code, message in err) in [(2, True), (4, True)], err
    assert err.count("error:") == 1
