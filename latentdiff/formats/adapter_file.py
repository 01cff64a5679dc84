"""Low-rank adapters as files: read under every name that trainers write, written under PEFT's or kohya's.

The names are in adapter_names.py. W' = W + weight * alpha / rank * B A (Hu et al. 2021, section 4.1); what other kinds
add is in networks/adapters/changes.py.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import regex  # type: ignore[import-untyped]
import torch
from safetensors import safe_open
from torch import Tensor, nn

from latentdiff.core.errors import ModelError, loading, raised_as, saving
from latentdiff.core.files import atomic
from latentdiff.formats.adapter_names import kohya_name, other_kind, places, split
from latentdiff.formats.folder import read_json
from latentdiff.formats.pickle import check_safetensors
from latentdiff.formats.tensors import widened, write_tensors
from latentdiff.networks.adapters.adapter import Adapter, Layer, Networks

NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
_HALVES = {"lora_A.weight", "lora_B.weight"}
_OF_KIND = {
    "lora": ("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_mid", "lora_magnitude_vector", "dora_scale"),
    "loha": ("hada_", "dora_scale"),
    "lokr": ("lokr_", "dora_scale"),
    "full": ("diff",),
}
_METADATA = "lora_adapter_metadata"  # diffusers' key of PEFT's config, which is JSON
_WORDS = "bundle_emb."  # textual inversions in the same file, as A1111 reads them
_MATCHING_SECONDS = 1.0  # a pattern in somebody's config could take for ever


def adapter_path(path: Path) -> Path:
    """The adapter file: `path` itself, or the one in this folder. Raises ModelError, UnsafeError."""
    file = next((path / name for name in NAMES if (path / name).is_file()), path) if path.is_dir() else path
    if not file.is_file():
        raise ModelError(f"no adapter at {path}. Give a .safetensors file, or a folder with {NAMES[0]}")
    check_safetensors(file)
    return file


def read_adapter(path: Path, networks: Networks) -> Adapter:
    """An adapter for these networks. Raises ModelError if none of its layers match, UnsafeError for a pickle."""
    file = adapter_path(path)
    with loading(file), safe_open(file, "pt") as content:
        state = {name: widened(content.get_tensor(name)) for name in content.keys()}  # noqa: SIM118
        config = _config(file, content.metadata() or {})
    if kind := other_kind(state):
        raise ModelError(f"{kind} adapters are not supported; LoRA, DoRA, LoHa, LoKr and full differences are ({path})")
    words, state = _bundled(state)
    named, unused = _by_place(state, networks)
    layers, missing = _layers(named, config, networks, path)
    adapter = Adapter(layers, sorted(unused), sorted(missing), words)
    if not adapter.matched:
        first = (adapter.unused or adapter.missing or ["nothing"])[0]
        raise ModelError(f"no name in the adapter is a layer of this model ({path}; {len(state)} names, first {first})")
    return adapter


Named = dict[tuple[str, str], dict[str, Tensor]]  # by (part, module), then by factor


def _bundled(state: dict[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The learnt words of a bundle, `bundle_emb.WORD.KEY`, and the other tensors."""
    words: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if name.startswith(_WORDS):
            word, _, key = name.removeprefix(_WORDS).partition(".")
            words.setdefault(word, {})[key] = tensor
    return words, {name: tensor for name, tensor in state.items() if not name.startswith(_WORDS)}


def _by_place(state: dict[str, Tensor], networks: Networks) -> tuple[Named, list[str]]:
    known = places(networks)
    named: Named = {}
    unused = []
    for name, tensor in state.items():
        layer, factor = split(name) or ("", "")
        if layer not in known:
            unused.append(name)
            continue
        shares = _shares(factor, tensor, [networks[part].get_submodule(module) for part, module in known[layer]], name)
        for place, share in zip(known[layer], shares, strict=True):
            if factor in named.setdefault(place, {}):
                raise ModelError(f"two tensors are {factor} of {'.'.join(place)}, one of them {name}")
            named[place][factor] = share
    return named, unused


def _shares(factor: str, tensor: Tensor, layers: Sequence[nn.Module], name: str) -> Sequence[Tensor]:
    """A factor of one layer in the file, divided among several layers here: its rows, or a copy of an inner factor.

    Raises ModelError.
    """
    if len(layers) == 1:
        return [tensor]
    if factor in ("lora_A.weight", "alpha"):
        return [tensor.clone() for _ in layers]
    weights: list[Any] = [layer.weight for layer in layers]
    rows = [len(weight) for weight in weights]
    if factor not in ("lora_B.weight", "lora_B.bias", "diff", "diff_b") or tensor.shape[:1] != (sum(rows),):
        raise ModelError(f"{name} of {tuple(tensor.shape)} does not divide into {len(rows)} layers of {sum(rows)} rows")
    return torch.split(tensor, rows)


def _layers(
    named: Named, config: dict[str, Any], networks: Networks, path: Path
) -> tuple[dict[str, dict[str, Layer]], list[str]]:
    layers: dict[str, dict[str, Layer]] = {}
    missing = []
    for (part, module), factors in named.items():
        name, target = f"{part}.{module}", networks[part].get_submodule(module)
        with raised_as(ModelError, f"{name}: cannot read alpha ({path})"):
            layer = _layer(factors, part, module, config)
        _check_numbers(layer, name, path)
        if layer.kind == "lora" and (absent := _HALVES - factors.keys()):
            missing += [f"{name}.{factor}" for factor in absent]
            continue
        if odd := [factor for factor in layer.factors if not factor.startswith(_OF_KIND[layer.kind])]:
            raise ModelError(f"{name} has an unknown factor {min(odd)} ({path})")
        layer = _fitted(_without_core(layer), target, name, path) if layer.kind == "lora" else layer
        if layer.kind != "lora" and "dora_scale" in layer.factors:
            scale = _magnitude(layer.factors["dora_scale"], target.weight, name, path)
            layer = replace(layer, factors={**layer.factors, "dora_scale": scale})
        layers.setdefault(part, {})[module] = layer
    return {part: _completed(own, part, path) for part, own in layers.items()}, missing


def _layer(factors: dict[str, Tensor], part: str, module: str, config: dict[str, Any]) -> Layer:
    """A layer with the alpha of its tensors, or else of PEFT's config.

    LyCORIS takes alpha / rank as 1 where both matrices of LoKr are whole; PEFT takes alpha / r, which is then put into
    the first matrix.
    """
    factors = dict(factors)
    own = factors.pop("alpha", None)
    layer = Layer(factors, None if own is None else float(own.item()), bool(_entry(config, part, "use_rslora")))
    if layer.kind == "lora" and "diff_b" in factors and factors.keys() >= _HALVES:
        factors["lora_B.bias"] = factors.pop("diff_b") / layer.scale
    if own is not None or layer.kind == "full":
        return layer
    alpha = _of_pattern(config, part, "alpha_pattern", module)
    if alpha is None:
        alpha = _entry(config, part, "lora_alpha" if layer.kind == "lora" else "alpha")
    layer = replace(layer, alpha=None if alpha is None else float(alpha))
    if alpha is not None and {"lokr_w1", "lokr_w2"} <= factors.keys():
        rank = _of_pattern(config, part, "rank_pattern", module) or _entry(config, part, "r")
        scale = 1.0 if rank is None else float(alpha) / float(rank)
        layer = replace(layer, factors={**factors, "lokr_w1": factors["lokr_w1"] * scale}, alpha=None)
    return layer


def _without_core(layer: Layer) -> Layer:
    """Tucker's form of a convolution, up (o, r) mid (r, s, k, k) down (s, i), with mid and down multiplied."""
    factors = dict(layer.factors)
    core = factors.pop("lora_mid", None)
    if core is None:
        return layer
    down, alpha = factors["lora_A.weight"], layer.full_alpha
    if core.ndim != 4 or core.shape[1] != len(down):
        return layer  # `_fitted` refuses it by name
    factors["lora_A.weight"] = torch.einsum("rskl,si->rikl", core, down.flatten(1))
    return replace(layer, factors=factors, alpha=alpha)


def _fitted(layer: Layer, target: nn.Module, name: str, path: Path) -> Layer:
    """The factors in the shapes of PEFT's layer for the target. Raises ModelError for a shape that does not fit.

    kohya writes factors of 1 x 1 convolutions and of linear layers alike, and vectors with extra axes of length 1.
    """
    weight: Tensor = target.weight  # type: ignore[assignment]
    factors = layer.factors
    if "lora_mid" in factors:
        raise ModelError(f"{name} has a lora_mid of {tuple(factors['lora_mid'].shape)} that does not fit ({path})")
    down, up = factors["lora_A.weight"], factors["lora_B.weight"]
    if weight.ndim == 2 and down.ndim == 4 and down.shape[2:] == (1, 1):
        down, up = down[..., 0, 0], up[..., 0, 0] if up.ndim == 4 else up
    if weight.ndim == 4:
        down, up = (t[..., None, None] if t.ndim == 2 else t for t in (down, up))
    rank = down.shape[0] if down.ndim else 0
    expected = (rank, *weight.shape[1:]), (weight.shape[0], rank, *[1] * (weight.ndim - 2))
    if not rank or weight.ndim not in (2, 4) or (tuple(down.shape), tuple(up.shape)) != expected:
        shapes = f"{tuple(up.shape)} x {tuple(down.shape)} for a weight of {tuple(weight.shape)}"
        raise ModelError(f"the adapter belongs to another model: {name} has {shapes} ({path})")
    fitted = {"lora_A.weight": down, "lora_B.weight": up}
    if "lora_B.bias" in factors:
        bias = factors["lora_B.bias"]
        if bias.numel() != weight.shape[0] or target.bias is None:
            raise ModelError(f"{name} has a lora_B.bias of {tuple(bias.shape)}, not {(weight.shape[0],)} ({path})")
        fitted["lora_B.bias"] = bias.reshape(-1)
    for factor in ("lora_magnitude_vector", "dora_scale"):
        if factor in factors:
            fitted |= _as_peft(_magnitude(factors[factor], weight, name, path, peft=factor != "dora_scale"))
    return Layer(fitted, layer.alpha, layer.rslora)


def _magnitude(vector: Tensor, weight: Any, name: str, path: Path, peft: bool = False) -> Tensor:
    """DoRA's lengths in the weight's axes, (out, 1, ...) or (1, in, ...): the axis that their shape names.

    PEFT has one for each output, as (out,) or (1, out, 1, 1); LyCORIS has either axis. Raises ModelError.
    """
    outputs, inputs = weight.shape[0], weight.shape[1] if weight.ndim > 1 else 0
    rest = [1] * (weight.ndim - 2)
    by_input = not peft and vector.ndim == weight.ndim and vector.shape[0] == 1 < outputs
    if vector.numel() != (inputs if by_input else outputs) or weight.ndim < 2:
        shapes = f"{tuple(vector.shape)} for a weight of {tuple(weight.shape)}"
        raise ModelError(f"{name} has magnitudes of {shapes} ({path})")
    return vector.reshape(1, inputs, *rest) if by_input else vector.reshape(outputs, 1, *rest)


def _as_peft(magnitude: Tensor) -> dict[str, Tensor]:
    """Lengths of outputs in the shape of PEFT's layer; those of inputs, which it does not have, as they are."""
    if magnitude.shape[0] == 1 < magnitude.shape[1]:
        return {"dora_scale": magnitude}
    return {"lora_magnitude_vector": magnitude.flatten() if magnitude.ndim == 2 else magnitude.transpose(0, 1)}


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
    carried = {module: layer for module, layer in layers.items() if layer.carried}
    own = {factor for layer in carried.values() for factor in layer.factors}
    if {"lora_magnitude_vector", "lora_B.bias"} <= own:
        raise ModelError(f"DoRA with biases is not defined ({path})")
    if "lora_magnitude_vector" in own:
        lacking = [m for m, x in carried.items() if "lora_magnitude_vector" not in x.factors]
        if lacking:
            raise ModelError(f"{part}.{lacking[0]} has no DoRA magnitudes, but other layers have ({path})")
    if "lora_B.bias" not in own:
        return layers
    return {module: _with_bias(layer) if module in carried else layer for module, layer in layers.items()}


def _with_bias(layer: Layer) -> Layer:
    up = layer.factors["lora_B.weight"]
    return replace(layer, factors={"lora_B.bias": up.new_zeros(up.shape[0]), **layer.factors})


def _of_pattern(config: dict[str, Any], part: str, key: str, module: str) -> Any:
    """The value of the first pattern that matches a module's name, whole or from a dot on, as PEFT matches."""
    patterns = _entry(config, part, key) or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{key} must be an object")
    for pattern, value in patterns.items():
        if regex.match(rf"(.*\.)?({pattern})$", module, timeout=_MATCHING_SECONDS):
            return value
    return None


def _entry(config: dict[str, Any], part: str, key: str) -> Any:
    """An entry of a part's config, or of the only config of a PEFT folder."""
    return config.get(f"{part}.{key}", config.get(key))


def _config(file: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """PEFT's config: in the file's metadata, or adapter_config.json beside it. Raises ModelError."""
    if _METADATA in metadata:
        config = json.loads(metadata[_METADATA])
    else:
        beside = file.parent / "adapter_config.json"
        config = read_json(beside) if file.name == NAMES[1] and beside.is_file() else {}
    if not isinstance(config, dict):
        raise ModelError(f"PEFT's config is not a JSON object ({file})")
    return config


def save_peft(adapter: Adapter, path: Path, about: Mapping[str, str] = MappingProxyType({})) -> None:
    """Write an adapter under PEFT's names, its alphas where diffusers reads them, and `about` in the metadata.

    Raises ModelError for what PEFT's format cannot hold.
    """
    state: dict[str, Tensor] = {}
    config: dict[str, Any] = {}
    for part, layers in adapter.layers.items():
        for module, layer in layers.items():
            if odd := layer.factors.keys() & {"diff", "diff_b", "dora_scale"}:
                raise ModelError(f"{part}.{module}: PEFT's format has no place for {min(odd)}. Write kohya's names")
            # diffusers has another name for the magnitudes of a text encoder
            names = {} if part == "unet" else {"lora_magnitude_vector": "lora_magnitude_vector.weight"}
            state |= {f"{part}.{module}.{names.get(name, name)}": tensor for name, tensor in layer.factors.items()}
        config |= {f"{part}.{key}": value for key, value in _peft_config(layers).items()}
        if any(layer.rslora for layer in layers.values()):
            config[f"{part}.use_rslora"] = True
        if any("lora_magnitude_vector" in layer.factors for layer in layers.values()):
            config[f"{part}.use_dora"] = True
    _save(state, path, {_METADATA: json.dumps(config | ({"about": dict(about)} if about else {}), sort_keys=True)})


def _peft_config(layers: Mapping[str, Layer]) -> dict[str, Any]:
    ranks = {module: layer.rank for module, layer in layers.items()}
    alphas = {module: layer.full_alpha for module, layer in layers.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    lora = all(layer.kind == "lora" for layer in layers.values())
    return {
        "r": rank,
        "lora_alpha" if lora else "alpha": alpha,
        "rank_pattern": {re.escape(module): value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {re.escape(module): value for module, value in alphas.items() if value != alpha},
        "target_modules": sorted(ranks),
    }


def save_kohya(
    adapter: Adapter, path: Path, networks: Networks, about: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Write an adapter under kohya's names, with alpha in the precision of its factors. Raises ModelError."""
    state: dict[str, Tensor] = {}
    for part, layers in adapter.layers.items():
        for module, layer in layers.items():
            name = kohya_name((part, module), networks)
            if layer.rslora:
                raise ModelError(f"{part}.{module} is scaled by alpha / sqrt(rank), which kohya's format cannot say")
            state |= {f"{name}.{factor}": tensor for factor, tensor in _kohya_factors(layer)}
            if layer.kind != "full":
                first = next(iter(layer.factors.values()))
                state[f"{name}.alpha"] = torch.tensor(layer.full_alpha, dtype=first.dtype)
    _save(state, path, {"ss_network_module": "networks.lora", **about})


def _kohya_factors(layer: Layer) -> Iterable[tuple[str, Tensor]]:
    names = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
    for factor, tensor in layer.factors.items():
        if factor == "lora_magnitude_vector":  # (out,) or (1, out, 1, 1) -> the weight's axes, as ComfyUI divides
            yield "dora_scale", tensor[:, None] if tensor.ndim == 1 else tensor.transpose(0, 1)
        else:
            yield names.get(factor, factor), tensor


def _save(state: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    with saving(path.name, path.parent), atomic(path) as made:
        write_tensors(state, made, metadata)
