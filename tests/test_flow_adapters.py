"""Adapters on the transformers of flow-matching families, in the names of every trainer."""

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import nn

from latentdiff.core.errors import ModelError
from latentdiff.drawing.record import read_metadata
from latentdiff.formats import adapter_file

from . import flow_models, flux, stable_diffusion_3
from .stable_diffusion import load
from .test_parts import flux_2_names, flux_names, stable_diffusion_3_names, z_image_names

PROMPT = "a castle on the hill"
OPTIONS = {"seed": 1, "num_inference_steps": 2, "width": 64, "height": 64, "output_type": "pt"}
RANK, ALPHA = 4, 8.0
MAKERS = {
    "Flux.1": flux.pipeline,
    "Stable Diffusion 3": stable_diffusion_3.pipeline,
    "Z-Image": lambda: flow_models.pipeline("Z-Image"),
    "FLUX.2 klein": lambda: flow_models.pipeline("FLUX.2 klein"),
    "Qwen-Image": lambda: flow_models.pipeline("Qwen-Image"),
}


NAMES = {  # original names of a state
    "FluxTransformer2DModel": flux_names,
    "Flux2Transformer2DModel": flux_2_names,
    "SD3Transformer2DModel": stable_diffusion_3_names,
    "ZImageTransformer2DModel": z_image_names,
    "QwenImageTransformer2DModel": dict,
}


@pytest.fixture(scope="module", params=MAKERS)
def folder(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("adapters") / request.param.replace(" ", "-")
    MAKERS[request.param]().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def plain(folder):
    return load(folder)(PROMPT, **OPTIONS).images


def _is_chosen(name):
    """Attention and feed-forward layers, of which an original may be one for several here."""
    return any(part in name for part in ("attn", "attention", "proj_mlp", "ff.", "feed_forward"))


def parts_of(kind, names):
    """Each layer of the original, and the layers here that are its parts, in order: by marks under these names."""
    marks = NAMES[kind]({f"{name}.weight": torch.full((1, 1), float(place)) for place, name in enumerate(names)})
    return {name.removesuffix(".weight"): [names[int(mark)] for mark in each[:, 0]] for name, each in marks.items()}


def factors(network):
    """Down and up of each layer by its name. Layers that are one in the original share their down."""
    rng, made = torch.Generator().manual_seed(1), {}
    layers = {
        name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear) and _is_chosen(name)
    }
    for parts in parts_of(type(network).__name__, list(layers)).values():
        down = torch.randn(RANK, layers[parts[0]].in_features, generator=rng)
        for name in parts:
            made[name] = down, 0.05 * torch.randn(layers[name].out_features, RANK, generator=rng)
    return made


def peft(made, prefix="transformer."):
    """PEFT's names, without alpha: then alpha is the rank."""
    scale = ALPHA / RANK
    return {
        f"{prefix}{name}.lora_{half}.weight": tensor
        for name, (down, up) in made.items()
        for half, tensor in (("A", down), ("B", scale * up))
    }


def one_trainer(made):
    state = {}
    for name, (down, up) in made.items():
        flat = "lora_transformer_" + name.replace(".", "_")
        state |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.alpha": torch.tensor(ALPHA)}
    return state


def originals(made, kind):
    """Down and up of each original layer: the ups of several here stand one below the other."""
    return {
        name: (made[parts[0]][0], torch.cat([made[part][1] for part in parts]))
        for name, parts in parts_of(kind, list(made)).items()
    }


def kohya(made, kind):
    state = {}
    for name, (down, up) in originals(made, kind).items():
        flat = "lora_unet_" + name.replace(".", "_")
        state |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.alpha": torch.tensor(ALPHA)}
    return state


def comfy(made, kind):
    """Dots and PEFT's factors behind ComfyUI's prefix, alpha in the second factor."""
    scale = ALPHA / RANK
    return {
        f"diffusion_model.{name}.lora_{half}.weight": tensor
        for name, (down, up) in originals(made, kind).items()
        for half, tensor in (("A", down), ("B", scale * up))
    }


def saved(state, path):
    save_file({name: tensor.clone() for name, tensor in state.items()}, path)
    return path


def draw(folder, file, weight=1.0):
    pipe = load(folder)
    fit = pipe.load_lora_weights(file, weight=weight)
    return pipe(PROMPT, **OPTIONS).images, fit


@pytest.mark.quick("Flux.1", "Qwen-Image", "Z-Image")
def test_four_formats_of_one_adapter_draw_one_picture(folder, plain, tmp_path):
    network = load(folder).model.parts["transformer"]
    kind, made = type(network).__name__, factors(network)
    states = {
        "peft": peft(made),
        "onetrainer": one_trainer(made),
        "kohya": kohya(made, kind),
        "comfy": comfy(made, kind),
    }
    pictures = {}
    for name, state in states.items():
        pictures[name], fit = draw(folder, saved(state, tmp_path / f"{name}.safetensors"))
        assert (fit.matched, fit.unused, fit.missing) == (len(made), [], []), name
    assert (pictures["peft"] - plain).abs().max() > 0.01
    for name, picture in pictures.items():
        torch.testing.assert_close(picture, pictures["peft"], rtol=0, atol=1e-5, msg=name)


def test_it_draws_what_diffusers_draws_with_it(folder, tmp_path):
    """PEFT's file in both, and the adapter at half its weight."""
    made = factors(load(folder).model.parts["transformer"])
    file = saved(peft(made), tmp_path / "pytorch_lora_weights.safetensors")
    theirs = DiffusionPipeline.from_pretrained(folder)
    theirs.load_lora_weights(tmp_path, weight_name=file.name, adapter_name="x")
    theirs.set_adapters(["x"], [0.5])
    ours = load(folder)
    ours.load_lora_weights(file, weight=0.5)
    inputs = _inputs(ours.model)
    with torch.no_grad():
        expected = type(ours.model.backbone)(theirs.transformer)(*inputs)
        torch.testing.assert_close(ours.model.backbone(*inputs), expected, rtol=1e-4, atol=1e-5)


def _inputs(model):
    from latentdiff.networks.conditions import stacked
    from latentdiff.networks.encoders.prompt import Prompt

    x = torch.randn(1, model.backbone.spec.inputs, 4, 4, generator=torch.Generator().manual_seed(3))
    conditions = stacked([model.encoder.encode(Prompt(PROMPT))])
    if "guidance" in model.backbone.spec.reads:
        conditions = conditions.joined({"guidance": torch.full((1,), 3.5)})
    return x, 500.0, conditions


@pytest.mark.slow
def test_merging_equals_attaching(folder, tmp_path):
    network = load(folder).model.parts["transformer"]
    file = saved(kohya(factors(network), type(network).__name__), tmp_path / "x.safetensors")
    attached, _ = draw(folder, file, weight=0.7)
    pipe = load(folder)
    pipe.load_lora_weights(file, weight=0.7, fuse=True)
    torch.testing.assert_close(pipe(PROMPT, **OPTIONS).images, attached, rtol=0, atol=2e-4)


@pytest.mark.slow
def test_round_trips_are_bitwise(folder, tmp_path, call):
    """PEFT's to kohya's and back, by the command line."""
    made = factors(load(folder).model.parts["transformer"])
    first = saved(peft(made), tmp_path / "first.safetensors")
    for source, to, name in ((first, "kohya", "second"), (tmp_path / "second.safetensors", "peft", "third")):
        code, _, err = call("convert", source, tmp_path / f"{name}.safetensors", "--to", to, "-m", folder)
        assert code == 0, err
    fused = saved(kohya(made, _kind(folder)), tmp_path / "fused.safetensors")
    code, _, err = call("convert", fused, tmp_path / "parted.safetensors", "--to", "peft", "-m", folder)
    assert code == 0, err
    torch.testing.assert_close(draw(folder, tmp_path / "parted.safetensors")[0], draw(folder, first)[0])
    before, after = load_file(first), load_file(tmp_path / "third.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def _kind(folder):
    return type(load(folder).model.parts["transformer"]).__name__


def test_names_without_a_place_are_reported(folder, tmp_path):
    made = factors(load(folder).model.parts["transformer"])
    name = next(iter(made))
    state = peft(made) | {"transformer.nowhere.lora_A.weight": torch.ones(4, 4)}
    state.pop(f"transformer.{name}.lora_B.weight")
    _, fit = draw(folder, saved(state, tmp_path / "x.safetensors"))
    assert fit.unused == ["transformer.nowhere.lora_A.weight"]
    assert fit.missing == [f"transformer.{name}.lora_B.weight"]
    assert fit.matched == len(made) - 1
    saved({"transformer.nowhere.lora_A.weight": torch.ones(4, 4)}, tmp_path / "none.safetensors")
    with pytest.raises(ModelError, match="no name in the adapter is a layer of this model"):
        draw(folder, tmp_path / "none.safetensors")


def test_layers_that_do_not_divide_are_refused(folder, tmp_path):
    network = load(folder).model.parts["transformer"]
    state = kohya(factors(network), type(network).__name__)
    fused = next((name for name in state if name.endswith("qkv.lora_up.weight")), None)
    if folder.name == "Qwen-Image":  # whose original has the same layers
        assert fused is None
        return
    odd = state | {fused: state[fused][:-1]}
    with pytest.raises(ModelError, match=r"does not divide into 3 layers of \d+ rows"):
        draw(folder, saved(odd, tmp_path / "x.safetensors"))


def test_texts_of_an_adapter(tmp_path):
    """kohya's names of CLIP and T5 on Flux.1."""
    flux.pipeline().save_pretrained(tmp_path / "flux")
    parts = load(tmp_path / "flux").model.parts
    clip, t5 = "text_model_encoder_layers_0_self_attn_q_proj", "encoder_block_0_layer_0_SelfAttention_q"
    width = parts["text_encoder_2"].encoder.block[0].layer[0].SelfAttention.q
    state = {
        f"lora_te1_{clip}.lora_down.weight": torch.ones(2, 32),
        f"lora_te1_{clip}.lora_up.weight": torch.ones(32, 2),
        f"lora_te3_{t5}.lora_down.weight": torch.ones(2, width.in_features),
        f"lora_te3_{t5}.lora_up.weight": torch.ones(width.out_features, 2),
    }
    adapter = adapter_file.read_adapter(
        saved(state, tmp_path / "x.safetensors"),
        {name: part for name, part in parts.items() if isinstance(part, nn.Module) and name != "vae"},
    )
    assert {part: list(layers) for part, layers in adapter.layers.items()} == {
        "text_encoder": ["encoder.layers.0.self_attn.q_proj"],
        "text_encoder_2": ["encoder.block.0.layer.0.SelfAttention.q"],
    }


def test_pictures_record_it(tmp_path, call):
    MAKERS["Z-Image"]().save_pretrained(tmp_path / "z")
    made = factors(load(tmp_path / "z").model.parts["transformer"])
    file = saved(peft(made), tmp_path / "x.safetensors")
    words = ("generate", PROMPT, "-m", tmp_path / "z", "-W", 64, "-H", 64, "--steps", 2, "-s", 1, "--lora", file)
    assert call(*words, "-o", tmp_path / "a.png")[0] == 0
    code, out, _ = call("reproduce", tmp_path / "a.png")
    assert (code, "equal: all" in out) == (0, True)
    (source,) = read_metadata(tmp_path / "a.png")["latentdiff"]["sources"]
    assert (source["path"], source["weight"]) == ("x.safetensors", 1.0)
