"""Adapters: every format on every family gives the same picture, by weight, beside the weights or in them."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn

from latentdiff import LatentDiffusionPipeline
from latentdiff.core.errors import ConfigError, ModelError, UnsafeError
from latentdiff.drawing.extras import adaptable_networks
from latentdiff.formats.adapter_file import read_adapter, save_kohya, save_peft
from latentdiff.networks.adapters.adapter import Adapter, Layer
from latentdiff.networks.adapters.attached import attach, weigh, weights_of
from latentdiff.networks.conditions import Conditions
from latentdiff.networks.encoders.prompt import Prompt, Style

from . import stable_diffusion
from .stable_diffusion import load

PROMPT = "a castle on a hill"
OPTIONS = {"num_inference_steps": 2, "width": 64, "height": 64, "seed": 1, "output_type": "latent", "sampler": "ddim"}


def draw(pipe):
    return pipe(PROMPT, **OPTIONS).images


def filled(state, seed=0):
    """The tensors of an adapter drawn anew, so that none is zero."""
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}


TARGETS = ["to_q", "to_out.0", "conv1", "proj_in", "ff.net.2"]


def adapter_state(folder, family, rank=4):
    """What PEFT itself makes of these layers, under diffusers' names; ranks differ from layer to layer."""
    pipe = load(folder)
    state = {}
    for part, network in adaptable_networks(pipe.model).items():
        targets, odd = (TARGETS, {"conv1": 3}) if part == "unet" else (["q_proj", "fc1"], {"fc1": 2})
        config = LoraConfig(r=rank, target_modules=targets, rank_pattern=odd)
        inject_adapter_in_model(config, network, "made")
        own = filled(get_peft_model_state_dict(network, adapter_name="made"))
        state |= {f"{part}.{name}": tensor for name, tensor in own.items()}
    return state


@pytest.fixture(scope="module")
def files(folders, tmp_path_factory):
    """The same adapter of each family in PEFT's names and in kohya's, with an alpha that is not the rank."""
    made = {}
    for family in ("1", "XL"):
        folder = folders[family]
        place = tmp_path_factory.mktemp("lora") / family
        place.mkdir()
        state = adapter_state(folder, family)
        parts = sorted({name.partition(".")[0] for name in state})
        config = {f"{part}.{key}": value for part in parts for key, value in (("r", 4), ("lora_alpha", 6.0))}
        save_file(state, place / "peft.safetensors", {"lora_adapter_metadata": json.dumps(config)})
        networks = adaptable_networks(load(folder).model)
        save_kohya(read_adapter(place / "peft.safetensors", networks), place / "kohya.safetensors", networks)
        made[family] = place
    return made


FAMILIES = pytest.mark.parametrize("family", ["1", "XL"])


@FAMILIES
def test_by_the_formula(folders, files, family):
    """W + weight * alpha / rank * B A, layer by layer, in the network that PEFT changes."""
    pipe, plain = load(folders[family]), load(folders[family])
    fit = pipe.load_lora_weights(files[family] / "peft.safetensors", weight=0.5, fuse=True)
    state = load_file(files[family] / "peft.safetensors")
    downs = [name for name in state if name.endswith("lora_A.weight")]
    assert (fit.matched, fit.unused, fit.missing) == (len(downs), [], [])
    for name in downs:
        part, _, module = name.removesuffix(".lora_A.weight").partition(".")
        down, up = state[name], state[name.replace("lora_A", "lora_B")]
        delta = 0.5 * 6 / len(down) * torch.einsum("or,r...->o...", up.flatten(1), down)
        before, after = (adaptable_networks(p.model)[part].get_submodule(module).weight for p in (plain, pipe))
        torch.testing.assert_close(after, before + delta.reshape(before.shape), rtol=1e-5, atol=1e-6)


@pytest.mark.quick("XL")
@FAMILIES
def test_kohya_s_twin_draws_the_same_picture(folders, files, family):
    """To the bit; and merged or beside the weights to rounding."""
    pictures = {}
    for name in ("peft", "kohya"):
        pipe = load(folders[family])
        plain = draw(pipe)
        fit = pipe.load_lora_weights(files[family] / f"{name}.safetensors", weight=0.7)
        assert not fit.unused + fit.missing
        pictures[name] = draw(pipe)
        pipe.fuse_lora()
        torch.testing.assert_close(draw(pipe), pictures[name], rtol=1e-3, atol=1e-3)
    assert torch.equal(pictures["peft"], pictures["kohya"])
    assert (pictures["peft"] - plain).abs().max() > 0.01


def test_the_scale_of_a_call_is_that_of_its_prompts_too(folders, files, monkeypatch):
    """Also where encoded prompts are kept from call to call."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    fast = LatentDiffusionPipeline.from_pretrained(folders["1"], device="cpu", speed="fast")
    plain = load(folders["1"])
    for pipe in (fast, plain):
        pipe.load_lora_weights(files["1"] / "peft.safetensors")
    pictures = []
    for scale in (1.0, 0.0, 1.0, 0.5):
        settings = OPTIONS | {"cross_attention_kwargs": {"scale": scale}}
        pictures.append(plain(PROMPT, **settings).images)
        torch.testing.assert_close(fast(PROMPT, **settings).images, pictures[-1], rtol=1e-3, atol=1e-3)
    assert (pictures[0] - pictures[1]).abs().max() > 0.01


@FAMILIES
def test_files_round_trip(folders, files, family, tmp_path):
    """PEFT -> kohya -> PEFT -> kohya: the same tensors and alphas, to the bit."""
    networks = adaptable_networks(load(folders[family]).model)
    save_peft(read_adapter(files[family] / "kohya.safetensors", networks), tmp_path / "peft.safetensors")
    first, again = load_file(files[family] / "peft.safetensors"), load_file(tmp_path / "peft.safetensors")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    save_kohya(read_adapter(tmp_path / "peft.safetensors", networks), tmp_path / "kohya.safetensors", networks)
    assert (tmp_path / "kohya.safetensors").read_bytes() == (files[family] / "kohya.safetensors").read_bytes()


@pytest.mark.quick("XL")
@FAMILIES
@pytest.mark.filterwarnings("ignore")
def test_diffusers_reads_both_as_we_do(folders, files, family, tmp_path):
    """The U-Net's layers of our PEFT file and of our kohya file, in diffusers' own pipeline."""
    kind = StableDiffusionXLPipeline if family == "XL" else StableDiffusionPipeline
    pipe = load(folders[family])
    networks = adaptable_networks(pipe.model)
    adapter = read_adapter(files[family] / "kohya.safetensors", networks)
    save_peft(adapter, tmp_path / "peft.safetensors")
    pipe.load_lora_weights(files[family] / "peft.safetensors", fuse=True)
    for file in (tmp_path / "peft.safetensors", files[family] / "kohya.safetensors"):
        theirs = kind.from_pretrained(folders[family])
        state = {name: tensor for name, tensor in load_file(file).items() if "unet" in name}
        metadata = None
        if file.name == "peft.safetensors":
            with open_metadata(file) as opened:
                metadata = json.loads(opened["lora_adapter_metadata"])
            theirs.unet.load_lora_adapter(state, prefix="unet", metadata=metadata)
        else:
            converted, alphas = kind.lora_state_dict(state, unet_config=theirs.unet.config)
            theirs.unet.load_lora_adapter(converted, prefix="unet", network_alphas=alphas)
        theirs.unet.fuse_lora()
        for module, layer in theirs.unet.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d) and module.endswith(".base_layer"):
                own = pipe.model.backbone.model.get_submodule(module.removesuffix(".base_layer"))
                torch.testing.assert_close(own.weight, layer.weight, rtol=1e-5, atol=1e-6)


class open_metadata:  # noqa: N801 - a context manager
    def __init__(self, path):
        from safetensors import safe_open

        self.file = safe_open(path, "pt")

    def __enter__(self):
        return self.file.__enter__().metadata()

    def __exit__(self, *error):
        self.file.__exit__(*error)


def test_earlier_names_of_diffusers(folders, files, tmp_path):
    """`processor.to_q_lora.down` and `lora.down` of files before PEFT, alpha being the rank."""
    state = {}
    for name, tensor in load_file(files["1"] / "peft.safetensors").items():
        if name.startswith("unet") and ".attn1.to_q." in name:
            old = name.replace(".attn1.to_q.lora_A", ".attn1.processor.to_q_lora.down")
            state[old.replace(".attn1.to_q.lora_B", ".attn1.processor.to_q_lora.up")] = tensor
    save_file(state, tmp_path / "old.safetensors")
    result = read_adapter(tmp_path / "old.safetensors", adaptable_networks(load(folders["1"]).model))
    assert result.matched == len(state) / 2
    assert all(layer.scale == 1 for layer in result.layers["unet"].values())


def test_a_peft_folder(folders, files, tmp_path):
    """adapter_model.safetensors names no part; its alpha is in the config beside it."""
    state = load_file(files["1"] / "peft.safetensors")
    unet = {f"base_model.model.{n.removeprefix('unet.')}": t for n, t in state.items() if n.startswith("unet.")}
    save_file(unet, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, "use_rslora": True}))
    result = read_adapter(tmp_path, adaptable_networks(load(folders["1"]).model))
    assert result.layers.keys() == {"unet"}
    for layer in result.layers["unet"].values():
        assert layer.scale == pytest.approx(8 / layer.rank**0.5)


def test_weights_of_what_is_attached():
    """As given, whatever alpha is; an adapter whose alpha is 0 everywhere adds nothing and has none."""
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    factors = {"lora_A.weight": torch.ones(2, 4), "lora_B.weight": torch.ones(4, 2)}
    adapters = {
        "one": {"0": Layer(factors, alpha=8.0), "1": Layer(factors, alpha=0.0)},
        "stable": {"0": Layer(factors, alpha=3.0, rslora=True)},
        "nothing": {"1": Layer(factors, alpha=0.0)},
    }
    plain = network(torch.ones(1, 4)).detach()
    for name, weight in (("one", 0.7), ("stable", -0.3), ("nothing", 0.5)):
        attach(Adapter({"": adapters[name]}), {"": network}, name, weight)
    assert weights_of({"": network}) == pytest.approx({"one": 0.7, "stable": -0.3})
    weigh({"": network}, {"one": 0.0})
    torch.testing.assert_close(network(torch.ones(1, 4)), plain)


def test_several_at_once(folders, files, tmp_path):
    """Each with its weight: the sum of both; once they are unloaded, the plain picture."""
    state = filled(load_file(files["1"] / "peft.safetensors"), seed=5)
    save_file(state, tmp_path / "other.safetensors")
    pipe = load(folders["1"])
    plain = draw(pipe)
    pipe.load_lora_weights(files["1"] / "peft.safetensors", adapter_name="one")
    pipe.load_lora_weights(tmp_path / "other.safetensors", weight=-0.3)
    loaded = draw(pipe)
    pipe.set_adapters(["one", "other"], [1.0, -0.3])
    assert torch.equal(draw(pipe), loaded)  # both are in use once they are loaded
    pipe.set_adapters(["one", "other"], [0.6, -0.3])
    both = draw(pipe)
    assert [(s.path, s.weight) for s in pipe.painter.sources.values()] == [
        ("peft.safetensors", 0.6),
        ("other.safetensors", -0.3),
    ]
    merged = load(folders["1"])
    merged.load_lora_weights(files["1"] / "peft.safetensors", weight=0.6, fuse=True)
    merged.load_lora_weights(tmp_path / "other.safetensors", weight=-0.3, fuse=True)
    torch.testing.assert_close(draw(merged), both, rtol=1e-3, atol=1e-3)
    pipe.set_adapters("one", 0.6)
    assert (draw(pipe) - both).abs().max() > 1e-3
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), plain)
    assert not pipe.painter.sources


def lycoris(kind, folder, tmp_path):
    """PEFT's own LoHa or LoKr of some layers, in LyCORIS's file format, and the network that PEFT merges it into."""
    config = {
        "loha": LoHaConfig(r=3, alpha=5, target_modules=["to_q", "conv1"], use_effective_conv2d=True),
        "lokr": LoKrConfig(r=2, alpha=3, target_modules=["to_q", "conv1"], use_effective_conv2d=True),
    }[kind]
    theirs = load(folder).model.backbone.model
    inject_adapter_in_model(config, theirs, "made")
    state = get_peft_model_state_dict(theirs, adapter_name="made")
    other = filled(state)
    named = dict(theirs.named_parameters())
    file = {}
    with torch.no_grad():
        for name, tensor in other.items():
            module, _, factor = name.rpartition(".")
            named[f"{module}.{factor}.made"].copy_(tensor)
            flat = "lora_unet_" + module.replace(".", "_")
            file[f"{flat}.{factor}"] = tensor
            file[f"{flat}.alpha"] = torch.tensor(float(config.alpha))
    for module in theirs.modules():
        if hasattr(module, "merge"):
            module.merge()
    save_file(file, tmp_path / f"{kind}.safetensors")
    return theirs


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_lycoris_is_merged_as_peft_does(folders, tmp_path, kind):
    theirs = lycoris(kind, folders["1"], tmp_path)
    pipe = load(folders["1"])
    fit = pipe.load_lora_weights(tmp_path / f"{kind}.safetensors", fuse=True)
    assert fit.matched > 4
    assert not fit.unused
    changed = 0
    for name, layer in theirs.named_modules():
        if name.endswith(".base_layer"):
            own = pipe.model.backbone.model.get_submodule(name.removesuffix(".base_layer"))
            torch.testing.assert_close(own.weight, layer.weight, rtol=1e-4, atol=1e-5)
            changed += 1
    assert changed == fit.matched
    with pytest.raises(ModelError, match="require fuse=True"):
        load(folders["1"]).load_lora_weights(tmp_path / f"{kind}.safetensors")


def test_dora(folders, tmp_path):
    """Weight-decomposed: PEFT's own layer, in PEFT's names and in kohya's."""
    theirs = load(folders["1"]).model.backbone.model
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q"], use_dora=True), theirs, "made")
    state = get_peft_model_state_dict(theirs, adapter_name="made")
    state = {
        n: t if "magnitude" in n else 0.1 * torch.ones_like(t).normal_(generator=torch.Generator().manual_seed(3))
        for n, t in state.items()
    }
    save_file({f"unet.{name}": tensor.contiguous() for name, tensor in state.items()}, tmp_path / "dora.safetensors")
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(theirs, state, "made")
    pipe = load(folders["1"])
    fit = pipe.load_lora_weights(tmp_path / "dora.safetensors")
    assert fit.matched == len(state) / 3
    x, context = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 77, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            pipe.model.backbone(x, 10.0, Conditions({"tokens": context})), theirs(x, torch.tensor(10.0), context).sample
        )


# what does not fit


def test_nothing_matched_is_an_error(folders, files, tmp_path):
    save_file({"something.else": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="no name in the adapter is a layer of this model"):
        load(folders["1"]).load_lora_weights(tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match=r"the adapter belongs to another model|no name in the adapter"):
        load(folders["1"]).load_lora_weights(files["XL"] / "peft.safetensors")
    with pytest.raises(ModelError, match=r"the adapter belongs to another model|no name in the adapter"):
        load(folders["XL"]).load_lora_weights(files["1"] / "kohya.safetensors")


def test_unused_and_missing_are_told(folders, files, tmp_path):
    state = load_file(files["1"] / "peft.safetensors")
    first = next(name for name in state if name.endswith("lora_B.weight"))
    half = {name: tensor for name, tensor in state.items() if name != first} | {
        "unet.nowhere.lora_A.weight": torch.zeros(1)
    }
    save_file(half, tmp_path / "half.safetensors")
    fit = load(folders["1"]).load_lora_weights(tmp_path / "half.safetensors")
    assert (fit.unused, fit.missing) == (["unet.nowhere.lora_A.weight"], [first])
    counts = f"{len(state) // 2 - 1} layers matched, 1 names unused, 1 missing"
    assert str(fit) == f"half: {counts} (unet.nowhere.lora_A.weight, {first})"


QUERY, VALUE = (f"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_{x}" for x in "qv")
PLAIN = {f"{QUERY}.lora_A.weight": torch.ones(2, 32), f"{QUERY}.lora_B.weight": torch.ones(32, 2)}


@pytest.fixture(scope="module")
def unchanged(folders):
    """A pipeline and a picture by it."""
    pipe = load(folders["1"])
    return pipe, draw(pipe)


@pytest.mark.parametrize(
    "changes",
    [
        {f"{QUERY}.lora_A.weight": torch.ones(2, 32, dtype=torch.int8)},
        {f"{QUERY}.lora_A.weight": torch.full((2, 32), float("nan"))},
        {f"{QUERY}.lora_A.weight": torch.ones(32, 2), f"{QUERY}.lora_B.weight": torch.ones(2, 32)},
        {f"{QUERY}.lora_A.weight": torch.ones(0, 32), f"{QUERY}.lora_B.weight": torch.ones(32, 0)},
        {f"{QUERY}.lora_A.weight": torch.ones(2, 32, 3, 3)},
        {f"{QUERY}.lora_B.weight": torch.ones(())},
        {f"{QUERY}.lora_B.bias": torch.ones(32)},
        {f"{QUERY}.alpha": torch.tensor(float("nan"))},
        {f"{QUERY}.alpha": torch.ones(3)},
        {f"{QUERY}.lora_magnitude_vector": torch.ones(7)},
        {f"{QUERY}.hada_w1_a": torch.ones(3, 3)},
        {
            f"{QUERY}.lora_magnitude_vector": torch.ones(32),
            f"{VALUE}.lora_A.weight": torch.ones(2, 32),
            f"{VALUE}.lora_B.weight": torch.ones(32, 2),
        },
    ],
    ids=range(12),
)
@pytest.mark.parametrize("fuse", [False, True])
def test_adapters_that_are_broken_change_nothing(unchanged, tmp_path, changes, fuse):
    """All of them are tried on one pipeline, which draws as before."""
    pipe, before = unchanged
    save_file(PLAIN | changes, tmp_path / "broken.safetensors")
    with pytest.raises(ModelError) as caught:
        pipe.load_lora_weights(tmp_path / "broken.safetensors", fuse=fuse)
    assert len(str(caught.value)) < 400
    assert torch.equal(draw(pipe), before)
    assert not pipe.painter.sources


PATTERN = {"alpha_pattern": {"(([a-z0-9_.]+)+)+!": 1}}


@pytest.mark.parametrize("config", [{"lora_alpha": "x"}, PATTERN, {"alpha_pattern": 3}])
def test_configs_of_adapters_from_outside(folders, tmp_path, config):
    """Patterns are no programs: they are compared, in no time, and what is not a number is refused."""
    save_file(PLAIN, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    if isinstance(config.get("alpha_pattern"), dict):
        assert load(folders["1"]).load_lora_weights(tmp_path / "x.safetensors").matched == 1
    else:
        with pytest.raises(ModelError, match="cannot read alpha"):
            load(folders["1"]).load_lora_weights(tmp_path / "x.safetensors")


def test_products_of_absurd_size_are_not_made(folders, tmp_path):
    flat = "lora_unet_" + QUERY.removeprefix("unet.").replace(".", "_")
    huge = {"hada_w1_a": (60_000, 1), "hada_w1_b": (1, 60_000), "hada_w2_a": (60_000, 1), "hada_w2_b": (1, 60_000)}
    save_file({f"{flat}.{name}": torch.ones(shape) for name, shape in huge.items()}, tmp_path / "loha.safetensors")
    save_file({f"{flat}.lokr_w{n}": torch.ones(600, 600) for n in (1, 2)}, tmp_path / "lokr.safetensors")
    for name in ("loha", "lokr"):
        with pytest.raises(ModelError, match="belongs to another model"):
            load(folders["1"]).load_lora_weights(tmp_path / f"{name}.safetensors", fuse=True)


def test_an_adapter_of_any_name_is_recorded(folders, tmp_path):
    """Called like what else is loaded, and merged while another is taken out of use but attached."""
    pipe = load(folders["1"])
    for name in ("weaker", "clip"):
        save_file(PLAIN, tmp_path / f"{name}.safetensors")
        pipe.load_lora_weights(tmp_path / f"{name}.safetensors", weight=0.1)
    pipe.load_weaker(folders["1"])
    assert [source.kind for source in pipe.painter.sources.values()] == ["lora", "lora", "weaker"]
    pipe.set_adapters([])
    with pytest.raises(ModelError, match="adapters are attached"):
        pipe.load_lora_weights(tmp_path / "clip.safetensors", "other", fuse=True)
    pipe.set_adapters("weaker", 1.0)


@pytest.mark.parametrize("name", ["lora.safetensors", "lora.bin"])
def test_a_pickle_is_refused(folders, tmp_path, name):
    torch.save({"unet.x.lora_A.weight": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(UnsafeError, match="is a pickle file"):
        load(folders["1"]).load_lora_weights(tmp_path / name)


def test_refused(folders, files, tmp_path):
    pipe = load(folders["1"])
    with pytest.raises(ModelError, match="no adapter at"):
        pipe.load_lora_weights(tmp_path / "none.safetensors")
    for weight in (11.0, float("nan")):
        with pytest.raises(ConfigError, match="weight must be from -10 to 10"):
            pipe.load_lora_weights(files["1"] / "peft.safetensors", weight=weight)
    pipe.load_lora_weights(files["1"] / "peft.safetensors")
    with pytest.raises(ConfigError, match="is in use"):
        pipe.load_lora_weights(files["1"] / "peft.safetensors")
    with pytest.raises(ModelError, match="no adapter 'x' is loaded; there are peft"):
        pipe.set_adapters("x")
    with pytest.raises(ConfigError, match="2 weights for 1 adapters"):
        pipe.set_adapters("peft", [1.0, 2.0])


def test_a_folder_with_adapters_beside_the_weights_is_not_saved(folders, files, tmp_path):
    """Fused they are saved in the weights."""
    pipe = load(folders["1"])
    pipe.load_lora_weights(files["1"] / "peft.safetensors")
    with pytest.raises(ConfigError, match=r"adapters are beside the weights \(peft\)"):
        pipe.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    pipe.fuse_lora()
    pipe.save_pretrained(tmp_path / "model")
    assert torch.equal(draw(load(tmp_path / "model")), draw(pipe))


# learnt words


@pytest.mark.quick("1-1", "3-XL")
@FAMILIES
@pytest.mark.parametrize("count", [1, 3])
def test_learnt_words(folders, family, count, tmp_path):
    """The word's vectors are read in its place, all of them; other prompts read as before."""
    pipe = load(folders[family])
    generator = torch.Generator().manual_seed(0)
    vectors = [
        torch.randn(count, stable_diffusion.width(name, True), generator=generator)
        for name in stable_diffusion.encoders(family)
    ]
    names = ["<castle>"] if family == "1" else ["clip_l", "clip_g"]
    file = tmp_path / ("learned_embeds.safetensors" if family == "1" else "<castle>.safetensors")
    save_file(dict(zip(names, vectors, strict=True)), file)
    before = pipe.model.encoder.encode(Prompt(PROMPT))
    assert pipe.load_textual_inversion(file) == ["<castle>"]
    after = pipe.model.encoder.encode(Prompt(PROMPT))
    assert torch.equal(before["tokens"], after["tokens"])
    if family == "XL":
        assert torch.equal(before["pooled"], after["pooled"])
    assert pipe.model.encoder.read("a <castle> here").tokens == 4 + count
    for encoder, own in zip(pipe.model.encoder.encoders, vectors, strict=True):
        (chunk,) = encoder.reader.chunks("a <castle> here", Style())
        read = encoder.model.get_input_embeddings().weight[chunk.ids]
        torch.testing.assert_close(read[1 : 1 + count], own)
    pipe.save_pretrained(tmp_path / "model")
    again = load(tmp_path / "model")
    torch.testing.assert_close(
        again.model.encoder.encode(Prompt("a <castle> here"))["tokens"],
        pipe.model.encoder.encode(Prompt("a <castle> here"))["tokens"],
    )


def test_words_in_capitals(folders, tmp_path):
    """CLIP's tokenizer is lower-case: the word gets vectors of its own, and the end token keeps its own."""
    save_file({"<InkStyle>": torch.full((2, 64), 3.0)}, tmp_path / "learned_embeds.safetensors")
    pipe = load(folders["1"])
    plain = pipe.model.encoder.encode(Prompt(PROMPT))["tokens"]
    pipe.load_textual_inversion(tmp_path)
    assert torch.equal(pipe.model.encoder.encode(Prompt(PROMPT))["tokens"], plain)
    for prompt in ("a <InkStyle> castle", "a <inkstyle> castle"):
        assert pipe.model.encoder.read(prompt).tokens == 6
        (chunk,) = pipe.model.encoder.reader.chunks(prompt, Style())
        assert (pipe.model.encoder.model.get_input_embeddings().weight[chunk.ids[1:3]] == 3).all()


def test_what_fails_to_load_changes_nothing(folders, tmp_path):
    """Neither the words before the one that does not fit, nor the layers before it."""
    pipe = load(folders["1"])
    before, size = draw(pipe), len(pipe.model.encoder.tokenizer)
    save_file({"<a>": torch.ones(64), "<b>": torch.ones(63)}, tmp_path / "words.safetensors")
    with pytest.raises(ModelError, match="has vectors of 63"):
        pipe.load_textual_inversion(tmp_path / "words.safetensors")
    assert len(pipe.model.encoder.tokenizer) == size
    flat = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_"
    factors = {"hada_w1_a": (32, 2), "hada_w1_b": (2, 32), "hada_w2_a": (32, 2), "hada_w2_b": (2, 32)}
    state = {f"{flat}q.{name}": torch.ones(shape) for name, shape in factors.items()}
    state |= {f"{flat}k.{name}": torch.ones(7, 7) for name in factors}
    save_file(state, tmp_path / "loha.safetensors")
    refusals = {True: r"belongs to another model: .*attn1\.to_k makes 49 numbers", False: "require fuse=True"}
    for fuse, message in refusals.items():
        with pytest.raises(ModelError, match=message):
            pipe.load_lora_weights(tmp_path / "loha.safetensors", fuse=fuse)
    assert torch.equal(draw(pipe), before)
    assert not pipe.painter.sources


def test_a1111_s_embeddings(folders, tmp_path):
    save_file({"emb_params": torch.ones(2, 64)}, tmp_path / "ink.safetensors")
    pipe = load(folders["1"])
    assert pipe.load_textual_inversion(tmp_path / "ink.safetensors", token="<ink>") == ["<ink>"]
    assert pipe.model.encoder.read("<ink>").tokens == 4
    assert pipe.painter.sources["embedding <ink>"].word == "<ink>"


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"<a>": torch.ones(63)}, "has vectors of 63 numbers, this model's have 64"),
        ({"castle</w>": torch.ones(64)}, "exists already"),
        ({}, "the file is empty|cannot load"),
        ({"<a>": torch.ones(0, 64)}, "embeddings must have the shape"),
        ({"<a>": torch.tensor(1.0)}, "embeddings must have the shape"),
        ({"<a>": torch.full((64,), float("nan"))}, "must have finite vectors"),
        ({"<a>": torch.ones(64, dtype=torch.int8)}, "must have finite vectors"),
        ({"": torch.ones(64)}, "is not a word"),
        ({"<a>": torch.ones(3, 64), "<a>_1": torch.ones(64)}, "share tokens"),
    ],
)
def test_words_that_do_not_fit(folders, tmp_path, state, message):
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=message):
        load(folders["1"]).load_textual_inversion(tmp_path / "x.safetensors")


def test_learnt_words_are_not_lost(folders, tmp_path):
    """A folder keeps them; a single file has no place, and says so."""
    from latentdiff.families.original import save_single_file

    save_file({"<a>": torch.ones(64)}, tmp_path / "x.safetensors")
    pipe = load(folders["1"])
    pipe.load_textual_inversion(tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match="a single file cannot hold learnt words"):
        save_single_file(pipe.model, tmp_path / "model.safetensors")


def test_two_encoders_need_two_embeddings(folders, tmp_path):
    save_file({"<a>": torch.ones(64)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="two text encoders require embeddings clip_l and clip_g"):
        load(folders["XL"]).load_textual_inversion(tmp_path / "x.safetensors")
