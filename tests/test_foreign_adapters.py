"""Adapters of other trainers, as their own libraries add them: W' = W + what the format's definition says."""

import json

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file, save_file

from latentdiff.core.errors import ModelError
from latentdiff.drawing.extras import adaptable_networks
from latentdiff.formats.adapter_file import read_adapter, save_kohya, save_peft
from latentdiff.formats.original import unet_name
from latentdiff.networks.conditions import Conditions

from . import stable_diffusion
from .stable_diffusion import load

QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
KEY = QUERY.replace("to_q", "to_k")
WIDE = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj"  # more outputs than inputs
CONV = "down_blocks.0.resnets.0.conv1"
NORM = "down_blocks.0.resnets.0.norm1"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"


def some(*shape, seed=0):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def flat(module):
    return "lora_unet_" + module.replace(".", "_")


@pytest.fixture(scope="module")
def loaded(folders):
    """A pipeline and the weights of its U-Net, for tests that leave its other parts as they are."""
    pipe = load(folders["1"])
    return pipe, {name: value.clone() for name, value in pipe.model.backbone.model.state_dict().items()}


@pytest.fixture
def unet(loaded):
    """The same, as it was before anything was loaded."""
    pipe, before = loaded
    painter = pipe.painter
    yield pipe, before
    pipe.unload_lora_weights()
    pipe.model.backbone.model.load_state_dict(before)
    pipe._painter = painter


@pytest.fixture
def fresh(folders):
    """A pipeline of its own, whose text encoder may learn words."""
    pipe = load(folders["1"])
    return pipe, {name: value.clone() for name, value in pipe.model.backbone.model.state_dict().items()}


def changed(pipe, before, module, kind="weight"):
    """What was added to a layer."""
    return pipe.model.backbone.model.get_submodule(module).state_dict()[kind] - before[f"{module}.{kind}"]


def assert_only(pipe, before, *names):
    """Every other weight of the U-Net is what it was, to the bit."""
    after = pipe.model.backbone.model.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(names)


def close(value, expected):
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)


# PEFT's configs


def by_peft(config, folder, tmp_path):
    """PEFT's own adapter in its folder format, and the network into which PEFT merged it."""
    theirs = load(folder).model.backbone.model
    inject_adapter_in_model(config, theirs, "made")
    state = get_peft_model_state_dict(theirs, adapter_name="made")
    named = dict(theirs.named_parameters())
    file = {}
    with torch.no_grad():
        for number, name in enumerate(state):
            place, _, factor = name.rpartition(".")
            inside = f"{place}.made.weight" if factor == "weight" else f"{name}.made"
            named[inside].copy_(some(*named[inside].shape, seed=number))
            file[f"base_model.model.{name}"] = named[inside].detach().clone()
    save_file(file, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config.to_dict(), default=list))
    for module in theirs.modules():
        if hasattr(module, "merge"):
            module.merge()
    return {name.replace(".base_layer", ""): value for name, value in theirs.state_dict().items()}


TARGETS = ["to_q", "conv1"]


@pytest.mark.quick(
    "LORA-4-{'.*to_q': 2.0}-{}",
    "LORA-4-{'attn1.to_q': 3.0, 'to_q': 5.0}-{}",
    "LORA-4-{}-{}",
    "LOHA-4-{}-{}",
    "LOKR-64-{'to_q': 3}-{'to_q': 2}",
)
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, alpha_pattern={r".*to_q": 2.0}),
        LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, alpha_pattern={r"^down_blocks\..*": 1.0}),
        LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, rank_pattern={r"down_blocks.*conv\d": 2}),
        LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, alpha_pattern={"attn1.to_q": 3.0, "to_q": 5.0}),
        LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, use_rslora=True),
        LoHaConfig(r=4, alpha=1, target_modules=TARGETS),
        LoHaConfig(r=4, alpha=2, target_modules=TARGETS, alpha_pattern={r".*\.attn2\.to_q": 8}),
        LoKrConfig(r=2, alpha=1, target_modules=TARGETS),
        LoKrConfig(r=2, alpha=1, target_modules=TARGETS, decompose_both=True),
        LoKrConfig(r=64, alpha=8, target_modules=TARGETS),  # both matrices whole: PEFT keeps alpha / r
        LoKrConfig(r=64, alpha=8, target_modules=TARGETS, rank_pattern={"to_q": 2}, alpha_pattern={"to_q": 3}),
    ],
    ids=lambda config: f"{config.peft_type.value}-{config.r}-{config.alpha_pattern}-{config.rank_pattern}",
)
def test_peft_configs(config, folders, tmp_path):
    """The weights are those that PEFT merges."""
    theirs = by_peft(config, folders["1"], tmp_path)
    pipe = load(folders["1"])
    fit = pipe.load_lora_weights(tmp_path, fuse=True)
    assert not fit.unused + fit.missing
    plain, ours = load(folders["1"]).model.backbone.model.state_dict(), pipe.model.backbone.model.state_dict()
    moved = [name for name in ours if not torch.equal(ours[name], plain[name])]
    assert len(moved) == fit.matched > 10
    for name in moved:
        close(ours[name] - plain[name], theirs[name] - plain[name])


@pytest.mark.parametrize("pattern", [r"(\w|\w\w|\.)+[A-Z]", "(", 5])
def test_patterns_that_are_traps(pattern, folders, tmp_path, monkeypatch):
    """One line; a pattern that takes for ever is stopped."""
    monkeypatch.setattr("latentdiff.formats.adapter_file._MATCHING_SECONDS", 0.1)
    state = {f"unet.{QUERY}.lora_A.weight": some(2, 32), f"unet.{QUERY}.lora_B.weight": some(32, 2)}
    config = {"r": 2, "lora_alpha": 2, "alpha_pattern": {pattern: 1} if isinstance(pattern, str) else pattern}
    save_file(state, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    with pytest.raises(ModelError, match=r"^[^\n]*cannot read alpha[^\n]*$"):
        load(folders["1"]).load_lora_weights(tmp_path / "x.safetensors")


# DoRA


def dora(weight, change, lengths, axis):
    """m (W + D) / |W + D|, the lengths taken over every axis but one."""
    whole = weight + change
    others = [a for a in range(weight.ndim) if a != axis]
    return (
        lengths.reshape([-1 if a == axis else 1 for a in range(weight.ndim)])
        * whole
        / torch.linalg.vector_norm(whole, dim=others, keepdim=True)
        - weight
    )


def factors(kind, outputs, inputs):
    """The factors of a kind and the change that they make, alpha half of the rank."""
    if kind == "lora":
        down, up = some(4, inputs, seed=1), some(outputs, 4, seed=2)
        return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0)}, up @ down / 2
    if kind == "loha":
        a, b, c, d = (
            some(outputs, 4, seed=1),
            some(4, inputs, seed=2),
            some(outputs, 4, seed=3),
            some(4, inputs, seed=4),
        )
        state = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, "alpha": torch.tensor(2.0)}
        return state, (a @ b) * (c @ d) / 2
    first, a, b = some(4, 4, seed=1), some(outputs // 4, 2, seed=2), some(2, inputs // 4, seed=3)
    state = {"lokr_w1": first, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(1.0)}
    return state, torch.kron(first, a @ b) / 2


@pytest.mark.parametrize("weight", [1.0, 0.5])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("module", [QUERY, WIDE])
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_dora_scale(kind, module, axis, weight, unet, tmp_path):
    """Of outputs (out, 1) or of inputs (1, in), on square layers too; a weight scales the whole change."""
    pipe, before = unet
    base = before[f"{module}.weight"]
    state, change = factors(kind, *base.shape)
    lengths = 1 + some(base.shape[axis], seed=9)
    state["dora_scale"] = lengths[:, None] if axis == 0 else lengths[None]
    save_file({f"{flat(module)}.{name}": tensor for name, tensor in state.items()}, tmp_path / "x.safetensors")
    pipe.load_lora_weights(tmp_path / "x.safetensors", weight=weight, fuse=True)
    close(changed(pipe, before, module), weight * dora(base, change, lengths, axis))
    assert_only(pipe, before, f"{module}.weight")


@pytest.mark.parametrize("axis", [0, 1])
def test_dora_of_a_convolution(axis, unet, tmp_path):
    pipe, before = unet
    base = before[f"{CONV}.weight"]
    down, up = some(2, *base.shape[1:], seed=1), some(base.shape[0], 2, 1, 1, seed=2)
    lengths = 1 + some(base.shape[axis], seed=3)
    shape = (-1, 1, 1, 1) if axis == 0 else (1, -1, 1, 1)
    state = {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": lengths.reshape(shape)}
    save_file({f"{flat(CONV)}.{name}": tensor for name, tensor in state.items()}, tmp_path / "x.safetensors")
    pipe.load_lora_weights(tmp_path / "x.safetensors", weight=0.5, fuse=True)
    change = torch.einsum("or,rikl->oikl", up[..., 0, 0], down)
    close(changed(pipe, before, CONV), 0.5 * dora(base, change, lengths, axis))


@pytest.fixture
def dora_file(folders, tmp_path):
    """PEFT's own DoRA of queries and convolutions, at twice its strength by alpha."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, use_dora=True)
    network = load(folders["1"]).model.backbone.model
    inject_adapter_in_model(config, network, "made")
    state = {
        f"unet.{name}": tensor if "magnitude" in name else some(*tensor.shape, seed=number)
        for number, (name, tensor) in enumerate(get_peft_model_state_dict(network, adapter_name="made").items())
    }
    path = tmp_path / "dora.safetensors"
    save_file(state, path, {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 8})})
    return path


def predicted(pipe):
    with torch.no_grad():
        x, tokens = some(1, 4, 8, 8, seed=5), some(1, 77, 64, seed=6)
        return pipe.model.backbone(x, 10.0, Conditions({"tokens": tokens}))


def test_dora_of_weight_0_is_the_base(folders, dora_file, unet):
    """To the bit, merged and beside the weights."""
    pipe, before = unet
    plain = predicted(pipe)
    pipe.load_lora_weights(dora_file, weight=0.0)
    assert torch.equal(predicted(pipe), plain)
    pipe.set_adapters("dora", 1.0)
    assert (predicted(pipe) - plain).abs().max() > 1e-3
    pipe.set_adapters("dora", 0.0)
    pipe.fuse_lora()
    assert_only(pipe, before)


@pytest.mark.parametrize("weight", [1.0, -0.7])
def test_dora_beside_the_weights_is_dora_in_them(weight, folders, dora_file, tmp_path):
    """In PEFT's names and in kohya's; half the weight is half the change of every layer's weight."""
    networks = adaptable_networks(load(folders["1"]).model)
    save_kohya(read_adapter(dora_file, networks), tmp_path / "kohya.safetensors", networks)
    kohya = load_file(tmp_path / "kohya.safetensors")
    assert kohya[f"{flat(QUERY)}.dora_scale"].shape == (32, 1)
    assert kohya[f"{flat(CONV)}.dora_scale"].shape == (32, 1, 1, 1)
    plain, ours, whole = (load(folders["1"]) for _ in range(3))
    ours.load_lora_weights(dora_file, weight=weight, fuse=True)
    whole.load_lora_weights(tmp_path / "kohya.safetensors", fuse=True)
    base = plain.model.backbone.model.state_dict()
    for module in (QUERY, CONV):
        close(changed(ours, base, module), weight * changed(whole, base, module))
    beside = load(folders["1"])
    beside.load_lora_weights(dora_file, weight=weight)
    torch.testing.assert_close(predicted(beside), predicted(ours), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_doras_at_once(folders, dora_file, tmp_path):
    """Both change the base's weights, not each other's, beside the weights and in them."""
    other = {n: t if "magnitude" in n else some(*t.shape, seed=77) for n, t in load_file(dora_file).items()}
    save_file(other, tmp_path / "other.safetensors")
    pipe, base = load(folders["1"]), load(folders["1"]).model.backbone.model.state_dict()
    alone = []
    for path, weight in ((dora_file, 0.6), (tmp_path / "other.safetensors", 0.3)):
        one = load(folders["1"])
        one.load_lora_weights(path, weight=weight, fuse=True)
        alone.append(changed(one, base, QUERY))
        pipe.load_lora_weights(path, weight=weight)
    before = predicted(pipe)
    pipe.fuse_lora()
    close(changed(pipe, base, QUERY), sum(alone))
    torch.testing.assert_close(predicted(pipe), before, rtol=1e-4, atol=1e-5)


# names


DOWN, UP = some(2, 32, seed=1), some(32, 2, seed=2)
TWICE, FLAT = "base_model.model.base_model.model", QUERY.replace(".", "_")
ORIGINAL = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
NAMES = {
    "peft": (f"unet.{QUERY}.lora_A.weight", f"unet.{QUERY}.lora_B.weight"),
    "peft in memory": (
        f"base_model.model.{QUERY}.lora_A.default.weight",
        f"base_model.model.{QUERY}.lora_B.default.weight",
    ),
    "peft twice": (f"{TWICE}.{QUERY}.lora_A.weight", f"{TWICE}.{QUERY}.lora_B.weight"),
    "diffusers": (f"unet.{QUERY}.lora.down.weight", f"unet.{QUERY}.lora.up.weight"),
    "diffusers, processors": (
        f"unet.{QUERY.replace('.to_q', '.processor.to_q')}_lora.down.weight",
        f"unet.{QUERY.replace('.to_q', '.processor.to_q')}_lora.up.weight",
    ),
    "kohya": (f"{flat(QUERY)}.lora_down.weight", f"{flat(QUERY)}.lora_up.weight"),
    "kohya, original": (f"{flat(ORIGINAL)}.lora_down.weight", f"{flat(ORIGINAL)}.lora_up.weight"),
    "kohya with dots": (f"unet.{QUERY}.lora_down.weight", f"unet.{QUERY}.lora_up.weight"),
    "lycoris": (
        f"lycoris_{QUERY.replace('.', '_')}.lora_down.weight",
        f"lycoris_{QUERY.replace('.', '_')}.lora_up.weight",
    ),
    "lycoris, unet": (f"lycoris_unet_{FLAT}.lora_down.weight", f"lycoris_unet_{FLAT}.lora_up.weight"),
    "comfy": (f"diffusion_model.{ORIGINAL}.lora_down.weight", f"diffusion_model.{ORIGINAL}.lora_up.weight"),
    "comfy, A and B": (f"diffusion_model.{ORIGINAL}.lora_A.weight", f"diffusion_model.{ORIGINAL}.lora_B.weight"),
}


@pytest.mark.parametrize("style", NAMES)
def test_names_of_the_unet(style, unet, tmp_path):
    pipe, before = unet
    save_file(dict(zip(NAMES[style], (DOWN, UP), strict=True)), tmp_path / "x.safetensors")
    fit = pipe.load_lora_weights(tmp_path / "x.safetensors", fuse=True)
    assert (fit.matched, fit.unused, fit.missing) == (1, [], [])
    close(changed(pipe, before, QUERY), UP @ DOWN)
    assert_only(pipe, before, f"{QUERY}.weight")


@pytest.mark.parametrize("family", ["1", "2", "XL"])
def test_every_layer_has_its_original_name(family, folders):
    """No two layers share a name, in either layout."""
    from latentdiff.formats.adapter_names import places

    networks = adaptable_networks(load(folders[family]).model)
    known = places(networks)
    unet = networks["unet"]
    for name, layer in unet.named_modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            original = unet_name(f"{name}.weight", unet.config).removesuffix(".weight").replace(".", "_")
            assert known[f"lora_unet_{original}"] == (("unet", name),)
            assert known[flat(name)] == (("unet", name),)


TEXTS = {
    "1": {
        "text_encoder": (
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight",
            "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.down.weight",
            "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
            "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.lora_down.weight",
        )
    },
    "XL": {
        "text_encoder": (
            "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
            "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
        ),
        "text_encoder_2": (
            "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
            "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
            "text_encoders.clip_g.transformer.text_model.encoder.layers.0.self_attn.q_proj.lora_down.weight",
        ),
    },
}


@pytest.mark.parametrize(
    ("family", "part", "name"),
    [(f, p, n) for f, parts in TEXTS.items() for p, names in parts.items() for n in names],
)
def test_names_of_text_encoders(family, part, name, folders, tmp_path):
    networks = adaptable_networks(load(folders[family]).model)
    module = next(m for m, _ in networks[part].named_modules() if m.endswith("layers.0.self_attn.q_proj"))
    width = networks[part].get_submodule(module).weight.shape[0]
    other = name.replace("lora_A", "lora_B").replace("down", "up")
    save_file({name: some(2, width), other: some(width, 2)}, tmp_path / "x.safetensors")
    adapter = read_adapter(tmp_path / "x.safetensors", networks)
    assert {place: list(layers) for place, layers in adapter.layers.items()} == {part: [module]}


def test_tucker_s_convolution(unet, tmp_path):
    """LoCon's lora_mid: up (o, r), mid (r, s, 3, 3), down (s, i)."""
    pipe, before = unet
    up, core, down = (
        some(32, 4, 1, 1, seed=1),
        some(4, 4, 3, 3, seed=2),
        some(4, before[f"{CONV}.weight"].shape[1], 1, 1),
    )
    names = {"lora_up.weight": up, "lora_mid.weight": core, "lora_down.weight": down, "alpha": torch.tensor(2.0)}
    save_file({f"{flat(CONV)}.{name}": tensor for name, tensor in names.items()}, tmp_path / "x.safetensors")
    expected = 0.5 * torch.einsum("or,rskl,si->oikl", up[..., 0, 0], core, down[..., 0, 0])
    for fuse in (True, False):
        pipe.load_lora_weights(tmp_path / "x.safetensors", str(fuse), fuse=fuse)
        close(changed(pipe, before, CONV), expected) if fuse else pipe.unload_lora_weights()
    save_file(
        {f"{flat(CONV)}.{n}": some(3, 5, 7) if "mid" in n else t for n, t in names.items()}, tmp_path / "y.safetensors"
    )
    with pytest.raises(ModelError, match="has a lora_mid of"):
        pipe.load_lora_weights(tmp_path / "y.safetensors", fuse=True)


def test_whole_differences(unet, tmp_path):
    """LyCORIS' diff and diff_b, and w_norm and b_norm of norms."""
    pipe, before = unet
    shapes = {
        f"{flat(CONV)}.diff": before[f"{CONV}.weight"].shape,
        f"{flat(CONV)}.diff_b": before[f"{CONV}.bias"].shape,
        f"{flat(NORM)}.w_norm": before[f"{NORM}.weight"].shape,
        f"{flat(NORM)}.b_norm": before[f"{NORM}.bias"].shape,
    }
    state = {name: some(*shape, seed=number) for number, (name, shape) in enumerate(shapes.items())}
    save_file(state, tmp_path / "x.safetensors")
    fit = pipe.load_lora_weights(tmp_path / "x.safetensors", weight=0.5, fuse=True)
    assert fit.matched == 2
    for tensor, (module, kind) in zip(
        state.values(), [(CONV, "weight"), (CONV, "bias"), (NORM, "weight"), (NORM, "bias")], strict=True
    ):
        close(changed(pipe, before, module, kind), 0.5 * tensor)
    with pytest.raises(ModelError, match="require fuse=True"):
        pipe.load_lora_weights(tmp_path / "x.safetensors", "again")
    networks = adaptable_networks(pipe.model)
    with pytest.raises(ModelError, match="PEFT's format has no place for diff"):
        save_peft(read_adapter(tmp_path / "x.safetensors", networks), tmp_path / "y.safetensors")
    save_kohya(read_adapter(tmp_path / "x.safetensors", networks), tmp_path / "z.safetensors", networks)
    again = load_file(tmp_path / "z.safetensors")
    assert all(
        torch.equal(again[name.replace("w_norm", "diff").replace("b_norm", "diff_b")], state[name]) for name in state
    )


def test_a_bias_beside_low_rank(unet, tmp_path):
    """diff_b with lora_up and lora_down: added whole, whatever alpha is."""
    pipe, before = unet
    module = QUERY.replace("to_q", "to_out.0")
    bias = some(32, seed=4)
    state = {"lora_down.weight": DOWN, "lora_up.weight": UP, "alpha": torch.tensor(1.0), "diff_b": bias}
    save_file({f"{flat(module)}.{name}": tensor for name, tensor in state.items()}, tmp_path / "x.safetensors")
    pipe.load_lora_weights(tmp_path / "x.safetensors", weight=0.5, fuse=True)
    close(changed(pipe, before, module), 0.25 * UP @ DOWN)
    close(changed(pipe, before, module, "bias"), 0.5 * bias)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bits(dtype, fresh, folders, tmp_path):
    """Every value of float8 is one of float16."""
    pipe, before = fresh
    down, up = DOWN.to(dtype), UP.to(dtype)
    save_file({f"unet.{QUERY}.lora_A.weight": down, f"unet.{QUERY}.lora_B.weight": up}, tmp_path / "x.safetensors")
    pipe.load_lora_weights(tmp_path / "x.safetensors", fuse=True)
    close(changed(pipe, before, QUERY), up.float() @ down.float())
    save_file({"<x>": some(2, 64).to(dtype)}, tmp_path / "words.safetensors")
    assert pipe.load_textual_inversion(tmp_path / "words.safetensors") == ["<x>"]


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("IA3", ["lora_unet_x.weight", "lora_unet_x.on_input"]),
        ("IA3", [f"base_model.model.{QUERY}.ia3_l"]),
        ("GLoRA", [f"{flat(QUERY)}.{name}.weight" for name in ("a1", "a2", "b1", "b2")]),
        ("OFT", [f"{flat(QUERY)}.oft_blocks"]),
        ("OFT", [f"base_model.model.{QUERY}.oft_R.default.weight"]),
        ("OFT", [f"{QUERY}.boft_R"]),
        ("VeRA", [f"{QUERY}.vera_lambda_d"]),
    ],
)
def test_other_kinds_are_refused_by_name(kind, names, folders, tmp_path):
    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=f"^{kind} adapters are not supported"):
        load(folders["1"]).load_lora_weights(tmp_path / "x.safetensors", fuse=True)


@pytest.mark.parametrize(
    "names",
    [
        ["lora_unet_nothing.lora_down.weight"],
        ["x", "", ".", "lora_A", ".lora_A.weight", "lora_A.weight"],
        [f"unet.{QUERY}.lora_A.weight", f"{flat(QUERY)}.lora_down.weight"],
        [f"text_encoder.{TEXT}.to_q_lora.down.weight"],
        ["text_encoders.clip_l.transformer.nowhere.lora_down.weight"],
    ],
)
def test_names_of_nothing_are_one_line(names, folders, tmp_path):
    save_file({name: torch.ones(2, 32) for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError) as caught:
        load(folders["1"]).load_lora_weights(tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value)


# words


def vectors_of(pipe, word, encoder=0):
    own = pipe.model.encoder.encoders[encoder]
    return own.model.get_input_embeddings().weight[own.tokenizer.convert_tokens_to_ids(word)].detach()


@pytest.mark.parametrize("key", ["emb_params", "string_to_param.*", "*", "clip_l"])
def test_words_without_a_name(key, folders, tmp_path):
    """The word is the file's stem."""
    save_file({key: some(2, 64)}, tmp_path / "inkish.safetensors")
    pipe = load(folders["1"])
    assert pipe.load_textual_inversion(tmp_path / "inkish.safetensors") == ["inkish"]
    assert torch.equal(vectors_of(pipe, "inkish"), some(2, 64)[0])
    assert torch.equal(vectors_of(pipe, "inkish_1"), some(2, 64)[1])


@pytest.mark.parametrize("keys", [("clip_l", "clip_g"), ("clip_g",)])
def test_words_of_another_encoder(keys, folders, tmp_path):
    save_file({key: some(2, 64) for key in keys}, tmp_path / "inkish.safetensors")
    pipe = load(folders["1"])
    with pytest.raises(ModelError, match="clip_g belongs to a text encoder that this model does not have"):
        pipe.load_textual_inversion(tmp_path / "inkish.safetensors")
    assert "clip_g" not in pipe.model.encoder.tokenizer.get_vocab()


@pytest.mark.parametrize("key", ["clip_l", "clip_g"])
def test_words_of_one_of_two_encoders(key, folders, tmp_path):
    """The other reads a vector of zeros."""
    place = ["clip_l", "clip_g"].index(key)
    name = stable_diffusion.encoders("XL")[place]
    vectors = some(2, stable_diffusion.width(name, True))
    save_file({key: vectors}, tmp_path / "inkish.safetensors")
    pipe = load(folders["XL"])
    assert pipe.load_textual_inversion(tmp_path / "inkish.safetensors") == ["inkish"]
    assert torch.equal(vectors_of(pipe, "inkish_1", place), vectors[1])
    assert not vectors_of(pipe, "inkish_1", 1 - place).any()


def test_words_of_any_name(call, folders, tmp_path):
    """A file called like a word that exists: --embedding NAME=PATH."""
    save_file({"emb_params": some(2, 64)}, tmp_path / "cat.safetensors")
    common = ("generate", "a <cat>", "-m", folders["1"], "--steps", 1, "-W", 64, "-H", 64)
    code, _, err = call(*common, "--embedding", tmp_path / "cat.safetensors", "-o", "a.png")
    assert code == 4
    assert "the word 'cat' exists already" in err
    code, _, err = call(*common, "--embedding", f"<cat>={tmp_path / 'cat.safetensors'}", "-o", "a.png")
    assert code == 0
    assert "words: <cat>\n" in err
    assert "has no learnt word" not in err
    code, _, err = call(*common[:1], "a dog", *common[2:], "--embedding", f"<cat>={tmp_path / 'cat.safetensors'}")
    assert (code, "warning: the prompt has no learnt word (<cat>)\n" in err) == (0, True)
    assert json.loads(call("info", tmp_path / "cat.safetensors")[1])["kind"] == "learnt words"
    code, out, _ = call("info", "a.png")
    assert [s["word"] for s in json.loads(out)["latentdiff"]["sources"]] == ["<cat>"]


def test_a_bundle(fresh, tmp_path):
    """A LoRA with its words in the same file, as A1111 reads it; a word that exists gets brackets."""
    pipe, before = fresh
    state = {f"{flat(QUERY)}.lora_down.weight": DOWN, f"{flat(QUERY)}.lora_up.weight": UP}
    words = {"bundle_emb.inkish.string_to_param.*": some(2, 64), "bundle_emb.chalk.emb_params": some(1, 64, seed=3)}
    save_file(state | words, tmp_path / "bundle.safetensors")
    fit = pipe.load_lora_weights(tmp_path / "bundle.safetensors", fuse=True)
    assert str(fit) == "bundle: 1 layers matched, 0 names unused, 0 missing; words: <chalk>, inkish"
    close(changed(pipe, before, QUERY), UP @ DOWN)
    assert torch.equal(vectors_of(pipe, "inkish_1"), some(2, 64)[1])
    assert torch.equal(vectors_of(pipe, "<chalk>"), some(1, 64, seed=3)[0])


def test_a_bundle_that_does_not_fit_changes_nothing(fresh, tmp_path):
    pipe, before = fresh
    state = {f"{flat(QUERY)}.lora_down.weight": DOWN, f"{flat(QUERY)}.lora_up.weight": UP}
    save_file(state | {"bundle_emb.inkish.emb_params": some(2, 63)}, tmp_path / "bundle.safetensors")
    for fuse in (True, False):
        with pytest.raises(ModelError, match="inkish has vectors of 63"):
            pipe.load_lora_weights(tmp_path / "bundle.safetensors", fuse=fuse)
    assert_only(pipe, before)
    assert not pipe.painter.sources


def test_a_bias_that_a_layer_does_not_have(loaded, tmp_path):
    state = {f"{flat(QUERY)}.diff_b": some(8)}
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=r"it changes the bias of .*, which has none"):
        loaded[0].load_lora_weights(tmp_path / "x.safetensors", fuse=True)
