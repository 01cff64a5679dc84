"""A LoRA in training: it starts as zero, only it is trained, and every tool reads the result."""

from itertools import product

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from latentdiff.core.errors import ConfigError
from latentdiff.drawing.extras import adaptable_networks
from latentdiff.families.own import seeded
from latentdiff.formats.adapter_file import save_kohya, save_peft
from latentdiff.networks.adapters import trained as taught_adapter
from latentdiff.networks.adapters.trained import Factors

from .stable_diffusion import load

PROMPT = "a castle on a hill"
OPTIONS = {"num_inference_steps": 2, "width": 64, "height": 64, "seed": 1, "output_type": "latent", "sampler": "ddim"}
KINDS = {
    "plain": Factors(4, 2.0),
    "rslora": Factors(4, 2.0, rslora=True),
    "dora": Factors(3, 3.0, dora=True),
    "convolutions": Factors(2, 4.0, convolutions=True),
}


def draw(pipe):
    return pipe(PROMPT, **OPTIONS).images


def begun(folder, factors):
    pipe = load(folder)
    networks = adaptable_networks(pipe.model)
    with seeded(0):
        taught_adapter.attach_factors(networks, factors)
    return pipe, networks


@torch.no_grad()
def learnt(networks):
    """As if it had been trained: every factor moved."""
    generator = torch.Generator().manual_seed(0)
    for parameter in taught_adapter.parameters_of(networks).values():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("kind", ["plain", "dora", "convolutions"])
def test_it_begins_as_nothing_and_is_all_that_is_trained(folders, kind):
    pipe, networks = begun(folders["1"], KINDS[kind])
    before = draw(load(folders["1"]))
    if kind == "dora":  # divides by the very lengths that it multiplies by
        torch.testing.assert_close(draw(pipe), before)
    else:
        assert torch.equal(draw(pipe), before)
    parameters = taught_adapter.parameters_of(networks)
    trained = {id(p) for network in networks.values() for p in network.parameters() if p.requires_grad}
    assert trained == {id(p) for p in parameters.values()}
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    per_layer = 3 if kind == "dora" else 2
    unet, text = ([n for n in parameters if n.startswith(part)] for part in ("unet.", "text_encoder."))
    attention = 8 * sum(
        "attn1.to_q" in n for n in dict(load(folders["1"]).model.backbone.model.named_parameters()) if "weight" in n
    )
    convolved = sum("conv" in name for name in unet)
    assert len(unet) - convolved == attention * per_layer
    assert (convolved > 0) == (kind == "convolutions")
    assert len(text) == 4 * 4 * per_layer, "four layers of four projections"
    with seeded(0):
        again = load(folders["1"])
        taught_adapter.attach_factors(adaptable_networks(again.model), KINDS[kind])
    others = taught_adapter.parameters_of(adaptable_networks(again.model))
    assert all(torch.equal(parameters[name], others[name]) for name in parameters), "a function of the seed"


QUICK = (("plain", "1"), ("dora", "1"), ("convolutions", "1"))
EACH = [pytest.param(*one, marks=() if one in QUICK else pytest.mark.slow) for one in product(KINDS, ("1", "XL"))]


@pytest.mark.parametrize(("kind", "family"), EACH)
def test_what_is_learnt_is_read_everywhere(folders, tmp_path, kind, family):
    """The same picture by our loader and by diffusers', in PEFT's names and in kohya's."""
    pipe, networks = begun(folders[family], KINDS[kind])
    before = draw(pipe)
    learnt(networks)
    expected = draw(pipe)
    assert (expected - before).abs().max() > 1e-3
    save_peft(taught_adapter.as_adapter(networks), tmp_path / "peft.safetensors", {"modelspec.title": "x"})
    ours = load(folders[family])
    fit = ours.load_lora_weights(tmp_path / "peft.safetensors")
    assert (fit.unused, fit.missing) == ([], [])
    torch.testing.assert_close(draw(ours), expected, rtol=1e-5, atol=1e-5)
    theirs = (StableDiffusionXLPipeline if family == "XL" else StableDiffusionPipeline).from_pretrained(folders[family])
    theirs.load_lora_weights(tmp_path, weight_name="peft.safetensors")
    theirs.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    settings = {"num_inference_steps": 2, "width": 64, "height": 64, "output_type": "latent", "guidance_scale": 5.0}
    torch.testing.assert_close(
        ours(PROMPT, sampler="ddim", spacing="trailing", latents=noise, **settings).images,
        theirs(PROMPT, latents=noise, **settings).images,
        rtol=1e-4,
        atol=1e-4,
    )
    if kind == "rslora":
        return
    save_kohya(taught_adapter.as_adapter(networks), tmp_path / "kohya.safetensors", networks, {"ss_seed": "0"})
    again = load(folders[family])
    again.load_lora_weights(tmp_path / "kohya.safetensors")
    torch.testing.assert_close(draw(again), expected, rtol=1e-5, atol=1e-5)


def test_nothing_to_put_it_beside():
    with pytest.raises(ConfigError, match="unet has no attention"):
        taught_adapter.attach_factors({"unet": torch.nn.Linear(2, 2)}, Factors(1, 1.0))


def test_alone_is_the_same_objects(folders):
    _, networks = begun(folders["1"], KINDS["plain"])
    parameters = taught_adapter.parameters_of(networks)
    part = taught_adapter.parameter_module(parameters)
    assert {id(p) for p in part.parameters()} == {id(p) for p in parameters.values()}
    assert all(name.replace("/", ".") in parameters for name in part.state_dict())
