"""Files of other tools as parts of a model: which parts a .safetensors or .gguf file holds, by names and shapes alone,
and their weights under the names of diffusers and transformers.

ComfyUI's checkpoints hold several parts, each under a prefix; Black Forest Labs' and others' files hold one.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers.loaders import single_file_utils as conversion
from safetensors import safe_open
from torch import Tensor

from latentdiff.core.errors import ModelError, loading
from latentdiff.families import FAMILIES, family_of
from latentdiff.families.layouts import Shapes
from latentdiff.families.weights import COUNTS, PartWeights
from latentdiff.formats import folder
from latentdiff.formats.gguf_file import is_gguf, read_gguf, shapes_in
from latentdiff.formats.pickle import check_safetensors
from latentdiff.formats.tensors import unscaled
from latentdiff.model import Family, Model
from latentdiff.networks.blocks import is_block, shape_of

State = dict[str, Tensor]
_PREFIXES = (  # of checkpoints with several parts
    "model.diffusion_model.",
    "diffusion_model.",
    "first_stage_model.",
    "vae.",
    "text_encoders.clip_l.transformer.",
    "text_encoders.clip_g.transformer.",
    "text_encoders.t5xxl.transformer.",
    "text_encoders.qwen3_4b.transformer.",
    "text_encoders.qwen3_8b.transformer.",
    "text_encoders.qwen25_7b.transformer.",
)
_SIGNS = {  # the end of a name that a text encoder or VAE has, whatever its size -> the classes that it may be of
    "encoder.block.0.layer.0.SelfAttention.k.weight": ("T5EncoderModel",),
    "encoder.layers.0.self_attn.k_proj.weight": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "layers.0.self_attn.k_proj.weight": ("Qwen3Model", "Qwen3ForCausalLM", "Qwen2_5_VLForConditionalGeneration"),
    "decoder.conv_in.weight": ("AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderKLQwenImage"),
}
_ROWS = ("token_embedding.weight", "shared.weight", "embed_tokens.weight")  # of texts; their width tells CLIPs apart


class _Shapes(dict[str, tuple[int, ...]]):
    """Shapes by name; the error for a missing name states the name."""

    def __missing__(self, name: str) -> tuple[int, ...]:
        raise ValueError(f"there is no weight {name}")


class Part(NamedTuple):
    """A part in a file: the prefix of its names, and the shapes of its weights without it."""

    file: Path
    prefix: str
    shapes: dict[str, tuple[int, ...]]


class KnownTransformer(NamedTuple):
    """The transformer of a file: its family, and its config in diffusers."""

    family: Family
    config: dict[str, Any]


def parts_in(file: Path) -> list[Part]:
    """The parts of a file, from its header. Raises ModelError, UnsafeError."""
    with loading(file):
        if is_gguf(file):
            shapes = shapes_in(file)
        else:
            check_safetensors(file, ". `latentdiff convert --trust-pickle` converts it")
            with safe_open(file, "pt") as weights:
                shapes = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    parts: dict[str, Part] = {}
    for name, shape in shapes.items():
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
        parts.setdefault(prefix, Part(file, prefix, _Shapes())).shapes[name.removeprefix(prefix)] = shape
    return list(parts.values())


def transformer_of(shapes: Shapes) -> KnownTransformer | None:
    """The family of a transformer with these names and shapes, and its config; None for anything else."""
    for family in FAMILIES:
        if family.layout is not None and (config := family.layout.config(shapes)) is not None:
            return KnownTransformer(family, config)
    return None


def transformer_in(file: Path) -> KnownTransformer | None:
    """The transformer that a file holds; None for anything else. Raises ModelError, UnsafeError."""
    with loading(file):
        known = [transformer_of(part.shapes) for part in parts_in(file)]
    return next((each for each in known if each is not None), None)


def joined(files: Sequence[Path], base: Path, variant: str | None = None) -> Model:
    """A model from a transformer's file and files of further parts; `base` supplies what they lack.

    base: a folder of the same family in diffusers' layout. Parts that a file holds need only their config there.
    variant: which of the base's weights.
    Raises ModelError, UnsafeError.
    """
    family = family_of(folder.read_index(base), base)
    states: dict[str, PartWeights] = {}
    holding: dict[str, Path] = {}
    for part in (part for file in files for part in parts_in(file)):
        with loading(part.file):
            name, config = _place_of(part, family, base)
        if name in states:
            raise ModelError(f"two of the files hold {name} ({part.file})")
        holding[name] = part.file
        state, kinds = _state(part, family, name, base), family.parts[name]
        fits = config is None or any(_is_of(state, base / name, kind) for kind in sorted(kinds))
        states[name] = PartWeights(state, None if fits else config)
    if "transformer" not in states:
        raise ModelError(f"no transformer in {', '.join(str(file) for file in files)}")
    folder.check_index(folder.read_index(base), base, family.parts, family.optional, states.keys())
    assert family.layout is not None
    try:
        return family.layout.load(base, variant, states)
    except ModelError:
        odd = _odd(states["transformer"].state, base, family)
        if odd is None:
            raise
        raise ModelError(f"the transformer in {holding['transformer']} does not fit: {odd}") from None


def _odd(state: State, base: Path, family: Family) -> str | None:
    """The first weight that differs from what the base's config describes, if nearly all others are the same."""
    expected = next(filter(None, (_shapes_of(base / "transformer", kind) for kind in family.parts["transformer"])), {})
    own = {name: shape_of(tensor) for name, tensor in state.items()}
    differing = sorted(name for name in expected.keys() | own.keys() if expected.get(name) != own.get(name))
    if not differing or len(differing) > len(expected) // 10:
        return None
    first = differing[0]
    shapes = [str(shapes[first]) if first in shapes else "nothing" for shapes in (own, expected)]
    return f"{first} is {shapes[0]} in the file, {shapes[1]} in the config of {base}"


def _is_of(state: State, directory: Path, kind: str) -> bool:
    """Whether a folder's config describes a network with these names and shapes: it states what no file shows."""
    return _shapes_of(directory, kind) == {name: shape_of(tensor) for name, tensor in state.items()}


def _has_names_of_diffusers(part: Part, family: Family, base: Path) -> bool:
    """Whether a part has the names and shapes of the base's transformer, as diffusers saves it."""
    kinds = family.parts.get("transformer", frozenset())
    return any(_shapes_of(base / "transformer", kind) == dict(part.shapes) for kind in kinds)


def _shapes_of(directory: Path, kind: str) -> dict[str, tuple[int, ...]] | None:
    """The names and shapes of the network that a folder's config describes; None if it describes none."""
    config = folder.read_json(directory / "config.json") if (directory / "config.json").is_file() else {}
    return _described(kind, json.dumps(config, sort_keys=True))


@lru_cache(maxsize=8)
def _described(kind: str, config: str) -> dict[str, tuple[int, ...]] | None:
    """See `_shapes_of`; cached, since twelve billion parameters take seconds to build, even on the meta device."""
    try:
        with torch.device("meta"):
            network = getattr(diffusers, kind).from_config(json.loads(config))
    except Exception:  # libraries raise nearly anything; then the config of the file's own shapes is taken
        return None
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def _place_of(part: Part, family: Family, base: Path) -> tuple[str, dict[str, Any] | None]:
    """The base's part that a file's part replaces, and a transformer's config. Raises ModelError."""
    if (transformer := transformer_of(part.shapes)) is not None:
        if transformer.family is not family:
            raise ModelError(f"{part.file} belongs to {transformer.family.name}, {base} to {family.name}")
        return "transformer", transformer.config
    if _has_names_of_diffusers(part, family, base):
        return "transformer", None
    classes = next((classes for sign, classes in _SIGNS.items() if _ending(part.shapes, sign)), None)
    for name, known in family.parts.items():
        if classes and known & {*classes} and (name == "vae" or _width(part.shapes) == _width_of(base / name)):
            return name, None
    first = next(iter(part.shapes))
    raise ModelError(f"{part.file}: {part.prefix}{first} belongs to no known part of {family.name}")


def _ending(shapes: Shapes, sign: str) -> str | None:
    """The first name that is `sign`, or ends with it after a dot."""
    return next((name for name in shapes if f".{name}".endswith(f".{sign}")), None)


def _width(shapes: Shapes) -> int | None:
    return next((shapes[name][1] for row in _ROWS if (name := _ending(shapes, row))), None)


def _width_of(directory: Path) -> int | None:
    config = folder.read_json(directory / "config.json") if (directory / "config.json").is_file() else {}
    width = config.get("hidden_size") or config.get("d_model") or config.get("text_config", {}).get("hidden_size")
    return width if isinstance(width, int) else None


def _state(part: Part, family: Family, name: str, base: Path) -> State:
    """The weights of a part under the libraries' names, in one precision."""
    with loading(part.file):
        state = _tensors(part)
        numbers = {key: tensor for key, tensor in state.items() if not is_block(tensor) and not key.endswith(COUNTS)}
        whole = [key for key, tensor in numbers.items() if not tensor.is_floating_point()]
        if whole:
            raise ModelError(f"weights must be floating-point numbers (got {state[whole[0]].dtype} for {whole[0]})")
        if name == "transformer":
            assert family.layout is not None
            state = state if _has_names_of_diffusers(part, family, base) else family.layout.converted(state)
        elif name == "vae":
            state = _vae(state, base)
        kinds = Counter(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
        dtype = kinds.most_common(1)[0][0] if kinds else torch.float32
        return {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in state.items()}


def _tensors(part: Part) -> State:
    """The tensors of a part by its own names."""
    if is_gguf(part.file):
        held = read_gguf(part.file)
        return {key: held[part.prefix + key] for key in part.shapes}
    with safe_open(part.file, "pt") as weights:
        return unscaled({key: weights.get_tensor(part.prefix + key) for key in part.shapes})


def _vae(state: State, base: Path) -> State:
    """Original names become diffusers'; those of other classes than AutoencoderKL must be diffusers' already."""
    config = folder.read_json(base / "vae" / "config.json")
    if any("down_blocks" in name or "up_blocks" in name for name in state):
        return state
    if config.get("_class_name") != "AutoencoderKL":
        raise ModelError("a VAE of this class requires the names of diffusers. Leave it to the folder")
    converted: Mapping[str, Tensor] = conversion.convert_ldm_vae_checkpoint(state, config)
    return dict(converted)
