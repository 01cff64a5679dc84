"""Low-rank adapters as files: under PEFT's and diffusers' names, and kohya's, which most trainers write.

    PEFT     unet.mid_block.attentions.0.proj_in.lora_A.weight           with PEFT's config as metadata or beside it
    kohya    lora_unet_mid_block_attentions_0_proj_in.lora_down.weight   with .alpha; LyCORIS adds hada_* and lokr_*

kohya's names have no dots, so they are compared with the names of the model's own layers; SDXL's may also be in the
original layout. W' = W + weight * alpha / rank * B A (Hu et al. 2021, section 4.1).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from diffusers.utils.state_dict_utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from latentdiff.core.errors import ModelError, loading, raised_as, saving
from latentdiff.core.files import let_others_read
from latentdiff.formats.folder import read_json
from latentdiff.formats.original import unet_name
from latentdiff.formats.pickle import refuse_pickle
from latentdiff.networks.adapters.adapter import Adapter, Layer, Networks

NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
_KOHYA = {"unet": ("lora_unet_",), "text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",)}
_FACTORS = {
    "lora_down.weight": "lora_A.weight",
    "lora_up.weight": "lora_B.weight",
    "dora_scale": "lora_magnitude_vector",
}
_HALVES = {"lora_A.weight", "lora_B.weight"}
_METADATA = "lora_adapter_metadata"  # diffusers' key of PEFT's config, which is JSON


def adapter_path(path: Path) -> Path:
    """The adapter file: `path` itself, or the one in this folder. Raises ModelError, UnsafeError."""
    match = next((path / name for name in NAMES if (path / name).is_file()), path) if path.is_dir() else path
    if not match.is_file():
        raise ModelError(f"no adapter at {path}. Give a .safetensors file, or a folder with {NAMES[0]}")
    refuse_pickle(match)
    return match


def read_adapter(path: Path, networks: Networks) -> Adapter:
    """An adapter for these networks. Raises ModelError if none of its layers is theirs, UnsafeError for a pickle."""
    file = adapter_path(path)
    with loading(file), safe_open(file, "pt") as content:
        state = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        config = _config(file, content.metadata() or {})
    kohya = any(name.startswith("lora_") for name in state)
    named, unused = _of_kohya(state, networks) if kohya else _of_peft(state, networks)
    layers, missing = _layers(named, config, networks, path)
    adapter = Adapter(layers, sorted(unused), sorted(missing))
    if not adapter.matched:
        first = (adapter.unused or adapter.missing or ["nothing"])[0]
        raise ModelError(f"no name in the adapter is a layer of this model ({path}; {len(state)} names, first {first})")
    return adapter


Named = dict[tuple[str, str], dict[str, Tensor]]  # by (part, module), then by factor


def _of_kohya(state: dict[str, Tensor], networks: Networks) -> tuple[Named, list[str]]:
    known = {flat: (part, module) for part, network in networks.items() for flat, module in kohya_names(part, network)}
    named: Named = {}
    unused = []
    for name, tensor in state.items():
        flat, _, factor = name.partition(".")
        if flat in known:
            named.setdefault(known[flat], {})[_FACTORS.get(factor, factor)] = tensor
        else:
            unused.append(name)
    return named, unused


def kohya_names(part: str, network: nn.Module) -> list[tuple[str, str]]:
    """kohya's names of every layer -> the layer's own name; of several for one layer, the last is the one we write."""
    pairs = []
    for module in _adaptable(network):
        plain = module if part == "unet" else "text_model." + module.removeprefix("text_model.")
        if part == "text_encoder_2" and module == "text_projection":
            plain = module
        names, config = [plain], cast(Any, network.config)
        if part == "unet" and config.addition_embed_type == "text_time":
            names.append(unet_name(f"{module}.weight", config).removesuffix(".weight"))
        pairs += [(prefix + name.replace(".", "_"), module) for name in names for prefix in _KOHYA[part]]
    return pairs


def _adaptable(network: nn.Module) -> list[str]:
    """The linear layers and convolutions, whether or not adapters are attached to them."""
    kinds = nn.Linear | nn.Conv2d
    names = [name for name, layer in network.named_modules() if isinstance(layer, kinds) and ".lora_" not in name]
    return [name.removesuffix(".base_layer") for name in names]


def _of_peft(state: dict[str, Tensor], networks: Networks) -> tuple[Named, list[str]]:
    named: Named = {}
    unused = []
    modules = {part: set(_adaptable(network)) for part, network in networks.items()}
    for name, tensor in _modern(state).items():
        match = re.fullmatch(r"(.*?)\.((?:lora_|hada_|lokr_)\w+(?:\.weight|\.bias)?|alpha)", name)
        place = match and _placed(match[1], modules)
        if match and place:
            factor = match[2].replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
            named.setdefault(place, {})[factor] = tensor
        else:
            unused.append(name)
    return named, unused


def _placed(name: str, modules: dict[str, set[str]]) -> tuple[str, str] | None:
    """Part and module of a dotted name. PEFT's own files name no part; older ones have a `text_model` in the name."""
    part, _, module = name.removeprefix("base_model.model.").partition(".")
    if part not in modules:
        part, module = "unet", name.removeprefix("base_model.model.")
    for candidate in (module, module.removeprefix("text_model."), f"text_model.{module}"):
        if candidate in modules.get(part, ()):
            return part, candidate
    return None


def _modern(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Diffusers' earlier names in PEFT's, by diffusers' own tables."""
    if any(".lora_A." in name or "hada_" in name or "lokr_" in name for name in state):
        return state
    texts = {name: tensor for name, tensor in state.items() if name.startswith("text_encoder")}
    rest = {name: tensor for name, tensor in state.items() if name not in texts}
    return convert_unet_state_dict_to_peft(rest) | (convert_state_dict_to_peft(texts) if texts else {})


def _layers(
    named: Named, config: dict[str, Any], networks: Networks, path: Path
) -> tuple[dict[str, dict[str, Layer]], list[str]]:
    layers: dict[str, dict[str, Layer]] = {}
    missing = []
    for (part, module), factors in named.items():
        name, alpha = f"{part}.{module}", factors.pop("alpha", None)
        with raised_as(ModelError, f"{name}: no alpha ({path})"):
            scale = _alpha(alpha, part, module, config)
        layer = Layer(factors, scale, bool(_entry(config, part, "use_rslora")))
        _check_numbers(layer, name, path)
        if layer.kind == "lora":
            if absent := _HALVES - factors.keys():
                missing += [f"{name}.{factor}" for factor in absent]
                continue
            if odd := factors.keys() - _HALVES - {"lora_magnitude_vector", "lora_B.bias"}:
                raise ModelError(f"{name} has an unknown factor {min(odd)} ({path})")
            layer = _fitted(layer, networks[part].get_submodule(module), name, path)
        layers.setdefault(part, {})[module] = layer
    return {part: _completed(own, part, path) for part, own in layers.items()}, missing


def _fitted(layer: Layer, target: Any, name: str, path: Path) -> Layer:
    """The factors in the shapes of PEFT's layer for the target. Raises ModelError for a shape that does not fit.

    kohya writes factors of 1 x 1 convolutions and of linear layers alike, and vectors with extra axes of length 1.
    """
    weight, factors = target.weight, layer.factors
    down, up = factors["lora_A.weight"], factors["lora_B.weight"]
    if weight.ndim == 2 and down.ndim == 4 and down.shape[2:] == (1, 1):
        down, up = down[..., 0, 0], up[..., 0, 0] if up.ndim == 4 else up
    if weight.ndim == 4:
        down, up = (t[..., None, None] if t.ndim == 2 else t for t in (down, up))
    rank = down.shape[0] if down.ndim else 0
    expected = (rank, *weight.shape[1:]), (weight.shape[0], rank, *[1] * (weight.ndim - 2))
    if not rank or (tuple(down.shape), tuple(up.shape)) != expected:
        shapes = f"{tuple(up.shape)} x {tuple(down.shape)} for a weight of {tuple(weight.shape)}"
        raise ModelError(f"the adapter belongs to another model: {name} has {shapes} ({path})")
    fitted = {"lora_A.weight": down, "lora_B.weight": up}
    vectors = {"lora_B.bias": (weight.shape[0],), "lora_magnitude_vector": _magnitudes(weight)}
    for factor, shape in vectors.items():
        if factor in factors:
            if factors[factor].numel() != weight.shape[0] or (factor == "lora_B.bias" and target.bias is None):
                raise ModelError(f"{name} has a {factor} of {tuple(factors[factor].shape)}, not {shape} ({path})")
            fitted[factor] = factors[factor].reshape(shape)
    return Layer(fitted, layer.alpha, layer.rslora)


def _magnitudes(weight: Tensor) -> tuple[int, ...]:
    """The shape of DoRA's magnitude vector, which has one length for each output."""
    return (weight.shape[0],) if weight.ndim == 2 else (1, weight.shape[0], 1, 1)


def _check_numbers(layer: Layer, name: str, path: Path) -> None:
    """Refuse factors that are not finite floating-point numbers, and an alpha that is not. Raises ModelError."""
    for factor, tensor in layer.factors.items():
        if not (tensor.is_floating_point() and tensor.ndim and tensor.numel() and bool(torch.isfinite(tensor).all())):
            raise ModelError(f"{name}.{factor} must hold finite floating-point numbers ({path})")
    if layer.alpha is not None and not math.isfinite(layer.alpha):
        raise ModelError(f"alpha must be finite (got {layer.alpha} for {name} in {path})")


def _completed(layers: dict[str, Layer], part: str, path: Path) -> dict[str, Layer]:
    """Complete an adapter for PEFT, which takes biases on all layers or on none: missing ones become zeros.

    Raises ModelError if only some layers have DoRA's magnitudes, which have no neutral value.
    """
    own = {factor for layer in layers.values() for factor in layer.factors}
    if "lora_magnitude_vector" in own:
        lacking = [m for m, x in layers.items() if x.kind == "lora" and "lora_magnitude_vector" not in x.factors]
        if lacking:
            raise ModelError(f"{part}.{lacking[0]} has no DoRA magnitudes, but other layers have ({path})")
    if "lora_B.bias" not in own:
        return layers
    return {module: _with_bias(layer) if layer.kind == "lora" else layer for module, layer in layers.items()}


def _with_bias(layer: Layer) -> Layer:
    up = layer.factors["lora_B.weight"]
    return replace(layer, factors={"lora_B.bias": up.new_zeros(up.shape[0]), **layer.factors})


def _alpha(given: Tensor | None, part: str, module: str, config: dict[str, Any]) -> float | None:
    if given is not None:
        return float(given.item())
    pattern = _entry(config, part, "alpha_pattern") or {}
    if not isinstance(pattern, dict):
        raise ValueError("alpha_pattern must be an object")
    for key, value in pattern.items():
        # PEFT's keys are patterns, which in practice are a layer's whole name or the end of it
        plain = key.replace("\\", "").strip("^$")
        if module == plain or module.endswith(f".{plain}"):
            return float(value)
    alpha = _entry(config, part, "lora_alpha")
    return None if alpha is None else float(alpha)


def _entry(config: dict[str, Any], part: str, key: str) -> Any:
    """An entry of a part's config, or of the only config of a PEFT folder."""
    return config.get(f"{part}.{key}", config.get(key))


def _config(file: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """PEFT's config: in the file's metadata, or adapter_config.json beside it. Raises ModelError."""
    if _METADATA in metadata:
        match = json.loads(metadata[_METADATA])
    else:
        beside = file.parent / "adapter_config.json"
        match = read_json(beside) if file.name == NAMES[1] and beside.is_file() else {}
    if not isinstance(match, dict):
        raise ModelError(f"its config is not a JSON object ({file})")
    return match


def save_peft(adapter: Adapter, path: Path, about: Mapping[str, str] = MappingProxyType({})) -> None:
    """Write an adapter under PEFT's names, its alphas where diffusers reads them, and `about` in the metadata."""
    state: dict[str, Tensor] = {}
    config: dict[str, Any] = {}
    for part, layers in adapter.layers.items():
        for module, layer in layers.items():
            # diffusers has another name for the magnitudes of a text encoder
            names = {} if part == "unet" else {"lora_magnitude_vector": "lora_magnitude_vector.weight"}
            state |= {f"{part}.{module}.{names.get(name, name)}": tensor for name, tensor in layer.factors.items()}
        ranks = {module: layer.rank for module, layer in layers.items()}
        alphas = {module: layer.full_alpha for module, layer in layers.items()}
        config |= {f"{part}.{key}": value for key, value in _peft_config(ranks, alphas).items()}
        if any(layer.rslora for layer in layers.values()):
            config[f"{part}.use_rslora"] = True
        if any("lora_magnitude_vector" in layer.factors for layer in layers.values()):
            config[f"{part}.use_dora"] = True
    _save(state, path, {_METADATA: json.dumps(config | ({"about": dict(about)} if about else {}), sort_keys=True)})


def _peft_config(ranks: dict[str, int], alphas: dict[str, float]) -> dict[str, Any]:
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {re.escape(module): value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {re.escape(module): value for module, value in alphas.items() if value != alpha},
        "target_modules": sorted(ranks),
    }


def save_kohya(
    adapter: Adapter, path: Path, networks: Networks, about: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Write an adapter under kohya's names, with alpha in the precision of its factors. Raises ModelError."""
    back = {factor: name for name, factor in _FACTORS.items()}
    state: dict[str, Tensor] = {}
    for part, layers in adapter.layers.items():
        single = part == "text_encoder" and "text_encoder_2" not in networks
        prefix = _KOHYA[part][0 if part == "unet" or single else -1]
        names = {module: flat for flat, module in kohya_names(part, networks[part]) if flat.startswith(prefix)}
        for module, layer in layers.items():
            if layer.rslora:
                raise ModelError(f"{part}.{module} is scaled by alpha / sqrt(rank), which kohya's format cannot say")
            state |= {f"{names[module]}.{back.get(name, name)}": tensor for name, tensor in layer.factors.items()}
            first = next(iter(layer.factors.values()))
            state[f"{names[module]}.alpha"] = torch.tensor(layer.full_alpha, dtype=first.dtype)
    _save(state, path, {"ss_network_module": "networks.lora", **about})


def _save(state: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    with saving(path.name, path.parent):
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata)
        let_others_read(path)
