"""The networks of a model folder, built and filled. Nothing is fetched, and only safetensors and GGUF are read."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import diffusers
import torch
from safetensors import safe_open
from torch import nn

from latentdiff.core.errors import ModelError, loading
from latentdiff.formats.folder import GGUF, check_depth, numbers_in, read_json, variant_of, weight_files
from latentdiff.formats.gguf_file import is_gguf, read_gguf
from latentdiff.model import EMPTY
from latentdiff.networks.backbones.unet import TIME_CONDITION, TIME_CONDITIONS, UNet
from latentdiff.networks.blocks import is_block, shape_of
from latentdiff.networks.codecs.autoencoder import Autoencoder
from latentdiff.networks.codecs.flux_2 import Flux2Autoencoder
from latentdiff.networks.codecs.identity import IdentityCodec
from latentdiff.networks.codecs.kl import KLAutoencoder
from latentdiff.networks.codecs.qwen_image import QwenImageAutoencoder
from latentdiff.networks.codecs.tiny import TinyAutoencoder
from latentdiff.networks.conditions import Conditions
from latentdiff.networks.controls.controlnet import ControlNet
from latentdiff.networks.controls.ip_adapter import ImageEncoder
from latentdiff.networks.controls.t2i_adapter import T2IAdapter
from latentdiff.networks.encoders.chat import ChatText
from latentdiff.networks.encoders.clip import END, START, TextEncoder
from latentdiff.networks.encoders.reading import Chat
from latentdiff.networks.encoders.second_clip import SecondTextEncoder
from latentdiff.networks.encoders.t5 import T5Text
from latentdiff.networks.encoders.two_clips import TwoTextEncoders
from latentdiff.networks.quiet import quietly
from latentdiff.networks.with_weights import with_weights

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

    from latentdiff.networks.clip import Clip

CODECS: dict[str, type[Autoencoder]] = {  # diffusers' class -> ours
    "AutoencoderKL": KLAutoencoder,
    "AutoencoderTiny": TinyAutoencoder,
    "AutoencoderKLFlux2": Flux2Autoencoder,
    "AutoencoderKLQwenImage": QwenImageAutoencoder,
}
_UNREAD = ("lm_head.weight", "position_ids", "inv_freq", "spiece_model", "logit_scale")  # weights of no layer
COUNTS = ("position_ids", "num_batches_tracked")  # whole numbers, which nothing computes with
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # safetensors'


def load_codec(directory: Path, variant: str | None = None) -> Autoencoder | IdentityCodec:
    """The VAE of a model folder, or the identity if it has none."""
    return load_vae(directory / "vae", variant) if (directory / "vae").is_dir() else _identity(directory)


def load_vae(folder: Path, variant: str | None = None, states: Parts = EMPTY) -> Autoencoder:
    """The VAE of a checked folder."""
    directory, part = folder.parent, folder.name
    name = read_json(folder / "config.json").get("_class_name", "AutoencoderKL")
    name = name if name in CODECS else "AutoencoderKL"
    codec = CODECS[name]
    vae = pretrained(getattr(diffusers, name), directory, part, variant, codec, states)
    with loading(part, directory):
        autoencoder = codec(vae)
        if not (math.isfinite(autoencoder.scale) and autoencoder.scale > 0 and math.isfinite(autoencoder.shift)):
            raise ModelError(f"{part}/config.json: scaling_factor must be positive, shift_factor finite ({directory})")
    return autoencoder.eval()


def codec_of(vae: Any) -> Autoencoder | None:
    """A module of diffusers' as a codec; None for anything else."""
    codec = CODECS.get(type(vae).__name__)
    return codec(vae).eval() if codec and isinstance(vae, nn.Module) else None


def _identity(directory: Path) -> IdentityCodec:
    part = "unet" if (directory / "unet").is_dir() else "transformer"
    channels = read_json(directory / part / "config.json").get("out_channels")
    if channels not in (1, 3):
        name = "U-Net" if part == "unet" else part
        raise ModelError(f"a {name} of {channels} channels requires a vae, and there is none ({directory})")
    return IdentityCodec(channels)


def load_text_encoder(directory: Path, variant: str | None = None, states: Parts = EMPTY) -> TextEncoder:
    """Tokenizer and CLIP text model of a model folder."""
    from transformers import CLIPTextModel

    return clip_text(CLIPTextModel, directory, variant, "", penultimate=False, states=states)


def load_text_encoders(
    directory: Path, variant: str | None = None
) -> TextEncoder | TwoTextEncoders | SecondTextEncoder:
    """The text encoder of a model folder, both of SDXL, or the second alone, which its refiner has."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    if not (directory / "text_encoder_2").is_dir():
        return load_text_encoder(directory, variant)
    if not (directory / "text_encoder").is_dir():
        alone = clip_text(CLIPTextModelWithProjection, directory, variant, "_2", penultimate=True)
        return SecondTextEncoder(alone).eval()
    first = clip_text(CLIPTextModel, directory, variant, "", penultimate=True)
    second = clip_text(CLIPTextModelWithProjection, directory, variant, "_2", penultimate=True)
    zero_empty = read_json(directory / "model_index.json").get("force_zeros_for_empty_prompt", True)
    return TwoTextEncoders(first, second, zero_empty=bool(zero_empty)).eval()


def load_t5(directory: Path, suffix: str, length: int, variant: str | None = None, states: Parts = EMPTY) -> T5Text:
    """The T5 of a model folder. length: tokens that it reads. Raises ModelError."""
    from transformers import T5EncoderModel, T5TokenizerFast

    folder = directory / f"tokenizer{suffix}"
    with loading(folder.name, directory), _without_collections():
        tokenizer = T5TokenizerFast.from_pretrained(folder, local_files_only=True)
    model = pretrained(T5EncoderModel, directory, f"text_encoder{suffix}", variant, states=states)
    _check_words(tokenizer, model, folder)
    return T5Text(tokenizer, model, length).eval()


def load_chat(directory: Path, network: Any, chat: Chat, variant: str | None = None, states: Parts = EMPTY) -> ChatText:
    """The language model of a model folder. network: its class in transformers. Raises ModelError."""
    from transformers import Qwen2TokenizerFast

    folder = directory / "tokenizer"
    with loading(folder.name, directory), _without_collections():
        tokenizer = Qwen2TokenizerFast.from_pretrained(folder, local_files_only=True)
    model = pretrained(network, directory, "text_encoder", variant, states=states)
    _check_words(tokenizer, model, folder)
    with loading("text_encoder", directory):
        texts = ChatText(tokenizer, model, chat).eval()
        layers = int(getattr(model.config, "text_config", model.config).num_hidden_layers)
        if not all(-layers - 1 <= layer <= layers for layer in chat.layers):
            raise ModelError(f"text_encoder has {layers} layers, layer {max(chat.layers)} is read ({directory})")
        return texts


def _check_words(tokenizer: Any, model: Any, folder: Path) -> None:
    """Raises ModelError if the tokenizer has ids that the text encoder does not have."""
    with loading(folder.name, folder.parent):
        rows, most = len(_rows(model)), max(tokenizer.get_vocab().values(), default=0)
        if most >= rows:
            raise ModelError(f"{folder.name} does not fit the text encoder's {rows} words ({folder.parent})")


def clip_text(
    network: Any, directory: Path, variant: str | None, suffix: str, *, penultimate: bool, states: Parts = EMPTY
) -> TextEncoder:
    """One CLIP text encoder of a model folder."""
    tokenizer, tokenizer_folder = load_tokenizer(directory, suffix), directory / f"tokenizer{suffix}"
    model = pretrained(network, directory, f"text_encoder{suffix}", variant, states=states)
    with loading(tokenizer_folder.name, directory):
        read, positions = tokenizer.model_max_length, model.config.max_position_embeddings
        if not (isinstance(read, int) and 2 <= read <= positions):
            raise ModelError(f"tokenizer reads {read} tokens, the text encoder has {positions} positions ({directory})")
        if not all(isinstance(tokenizer.convert_tokens_to_ids(t), int) for t in (START, END, tokenizer.pad_token)):
            raise ModelError(f"{tokenizer_folder.name} has no start, end or padding ({directory})")
        _check_words(tokenizer, model, tokenizer_folder)
        encoder = TextEncoder(tokenizer, model, penultimate=penultimate).eval()
        encoder.tokenize(["a"])
    return encoder


def load_tokenizer(directory: Path, suffix: str = "") -> CLIPTokenizer:
    """The tokenizer of a model folder. Raises ModelError."""
    from transformers import CLIPTokenizer

    folder = directory / f"tokenizer{suffix}"
    with loading(folder.name, directory), _without_collections():
        if not folder.is_dir():  # or transformers searches the hub
            raise ModelError(f"{folder.name} is missing ({directory})")
        tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        return tokenizer


@contextmanager
def _without_collections() -> Iterator[None]:
    """A block without garbage collections, which triple the time to read the 100,000 objects of a tokenizer."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _rows(model: Any) -> Any:
    return model.get_input_embeddings().weight


def load_unet(directory: Path, variant: str | None = None) -> UNet:
    """The U-Net of a model folder. Raises ModelError."""
    unet = UNet(pretrained(diffusers.UNet2DConditionModel, directory, "unet", variant, UNet)).eval()
    name = unet.model.config.get(TIME_CONDITION, TIME_CONDITIONS[0])
    if name not in TIME_CONDITIONS:
        known, where = " or ".join(TIME_CONDITIONS), f"{directory}/unet/config.json"
        raise ModelError(f"{TIME_CONDITION} must be {known} (got {str(name)[:40]!r} in {where})")
    return unet


def load_clip(directory: Path, text_encoder: Path | None = None) -> Clip:
    """The CLIP of a model folder. Its text encoder may lie in another folder."""
    from latentdiff.networks.clip import Clip  # open_clip takes seconds to import

    (file,) = weight_files((text_encoder or directory) / "text_encoder")
    with loading("clip", directory):
        return Clip.load(directory / "clip", _token_embedding(file))


def _token_embedding(file: Path) -> torch.Tensor:
    """The only tensor of that name in a text encoder's file."""
    end = "token_embedding.weight"
    if is_gguf(file):
        (rows,) = (tensor for name, tensor in read_gguf(file).items() if name.endswith(end))
        return rows
    with safe_open(file, "pt") as weights:
        (name,) = (name for name in weights.keys() if name.endswith(end))  # noqa: SIM118
        return weights.get_tensor(name)


class PartWeights(NamedTuple):
    """The weights of a part, and its config if a folder's does not apply."""

    state: dict[str, torch.Tensor]
    config: dict[str, Any] | None = None


Parts = Mapping[str, PartWeights]


def pretrained(
    network: Any,
    directory: Path,
    part: str,
    variant: str | None,
    wrapper: Any = None,
    states: Parts = EMPTY,
) -> Any:
    """A network of a checked folder; all its weights come from the file, or from `states`.

    network: its class, wrapper: ours.
    """
    if part in states:
        return _filled(network, directory, part, wrapper, states[part])
    if (directory / part / GGUF).is_file():
        (file,) = weight_files(directory / part, variant)
        return _filled(network, directory, part, wrapper, PartWeights(read_gguf(file)))
    with loading(part, directory), quietly():
        if not (directory / part / "config.json").is_file():  # or transformers searches the hub
            raise ModelError(f"{part} is missing ({directory})")
        config, files = read_json(directory / part / "config.json"), weight_files(directory / part, variant)
        kinds = {name: kind for file in files for name, kind in _kinds(file).items()}
        check_depth(config, len(kinds), part, directory)
        described = parameters_of(network, json.dumps(config, sort_keys=True), wrapper)
        held = sum(map(numbers_in, files))
        if described > 2 * held:  # below twice, the loaders name the weights that do not fit
            raise ModelError(
                f"{part}/config.json describes {described:,} parameters, its weights hold {held:,} ({directory})"
            )
        model, report = network.from_pretrained(
            directory / part,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            variant=variant_of(directory / part, variant),
            torch_dtype=_stored_dtype(kinds, directory / part),
        )
        absent = sorted(report["missing_keys"])
        if absent:
            raise ModelError(f"{part}: {len(absent)} weights are missing, the first is {absent[0]} ({directory})")
        if report["unexpected_keys"]:
            first = sorted(report["unexpected_keys"])[0]
            count = len(report["unexpected_keys"])
            warnings.warn(
                f"{part}: {count} weights belong to no layer, the first is {first} ({directory})", stacklevel=2
            )
        return model


def _filled(network: Any, directory: Path, part: str, wrapper: Any, weights: PartWeights) -> Any:
    """A network with exactly the weights that are given."""
    with loading(part, directory), quietly():
        config = weights.config or read_json(directory / part / "config.json")
        described = parameters_of(network, json.dumps(config, sort_keys=True), wrapper)
        if described > 2 * (held := sum(math.prod(shape_of(tensor)) for tensor in weights.state.values())):
            raise ModelError(f"{part}/config.json describes {described:,} parameters, its weights hold {held:,}")
        if hasattr(network, "load_config") or any(map(is_block, weights.state.values())):  # diffusers
            return with_weights(network, config, weights.state)
        dtype = next(iter(weights.state.values())).dtype
        settings = {"config": network.config_class.from_dict(config), "state_dict": weights.state, "dtype": dtype}
        model, report = network.from_pretrained(None, output_loading_info=True, **settings)
        if absent := sorted(report["missing_keys"]):
            raise ModelError(f"{part}: {len(absent)} weights are missing, the first is {absent[0]}")
        if more := sorted(name for name in report["unexpected_keys"] if not name.endswith(_UNREAD)):
            raise ModelError(f"{part}: {len(more)} weights belong to no layer, the first is {more[0]}")
        return model


def _stored_dtype(kinds: dict[str, str], folder: Path) -> torch.dtype:
    """The precision of a network's weights on the disk, in which they are loaded; callers convert them.

    Of several precisions it is one that holds all of them, so that loading rounds no weight. Raises ModelError for
    weights that are not floating point.
    """
    odd = [name for name, kind in kinds.items() if kind not in _DTYPES and not name.endswith(COUNTS)]
    if odd:
        raise ModelError(f"{folder.name}: weights must be floats of 16 bits or more (got {odd[0]} in {folder.parent})")
    dtypes = {_DTYPES[kind] for kind in kinds.values() if kind in _DTYPES}
    return reduce(torch.promote_types, dtypes) if dtypes else torch.float32


def _kinds(file: Path) -> dict[str, str]:
    """The type of each tensor of a safetensors file, from its header."""
    with safe_open(file, "pt") as weights:
        return {name: weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118


@lru_cache(maxsize=64)
def parameters_of(network: Any, config: str, wrapper: Any = None) -> int:
    """The number of parameters of the network that a config describes; it runs once on the meta device.

    So a wrong config fails here, before memory is allocated or a weight is read.
    wrapper: our class for it; None for a text encoder.
    """
    tree = json.loads(config)
    with torch.device("meta"), torch.no_grad():
        if hasattr(network, "load_config"):  # diffusers
            skeleton = network.from_config(tree)
        else:
            skeleton = network(network.config_class.from_dict(tree))
        if wrapper is None:
            _run_text_encoder(skeleton)
        elif issubclass(wrapper, Autoencoder):
            _run_codec(wrapper(skeleton))
        elif issubclass(wrapper, ControlNet):
            _run_control(wrapper(skeleton))
        elif issubclass(wrapper, ImageEncoder):
            side = skeleton.config.image_size
            skeleton(torch.zeros(1, 3, side, side))
        elif issubclass(wrapper, T2IAdapter):
            hint = torch.zeros(1, 3, 64, 64)
            wrapper(skeleton).residuals(hint, 0.0, Conditions({}), hint, scale=1.0, guess=False, kind=0)
        else:
            _run_backbone(wrapper(skeleton))
    return sum(p.numel() for p in skeleton.parameters())


def _run_text_encoder(skeleton: Any) -> None:
    hidden = skeleton(torch.zeros(1, 2, dtype=torch.long), output_hidden_states=True).hidden_states
    if len(hidden) < 2:
        raise ValueError("it has no layers")


def _run_codec(codec: Autoencoder) -> None:
    side = 4 * codec.factor
    codec.decode(codec.encode(torch.zeros(1, codec.image_channels, side, side))[0])


def _run_backbone(backbone: Any) -> None:
    """Run a backbone on the meta device with small inputs, in which prompts have three tokens."""
    spec, levels = backbone.spec, getattr(backbone.model.config, "block_out_channels", None)
    side = 2 ** len(levels) if levels else 2 * spec.multiple
    conditions = {name: torch.zeros(1, *(length or 3 for length in shape)) for name, shape in spec.reads.items()}
    if getattr(backbone.model, "class_embedding", None) is not None and "label" not in spec.reads:
        raise ValueError("it reads classes in a form that is not known")
    backbone(torch.zeros(1, spec.inputs, side, side), torch.zeros(1), Conditions(conditions))


def _run_control(control: ControlNet) -> None:
    """Run a ControlNet on the meta device with small inputs."""
    config = control.model.config
    levels = len(config.block_out_channels)
    side = 2**levels
    arrays = {name: torch.zeros(1, *(length or 3 for length in shape)) for name, shape in control.reads.items()}
    hint = torch.zeros(1, control.channels, control.factor * side, control.factor * side)
    x, time = torch.zeros(1, config.in_channels, side, side), torch.zeros(1)
    control.residuals(x, time, Conditions(arrays), hint, scale=1.0, guess=False, kind=0)


def weights_hash(network: nn.Module) -> str:
    """sha256 of a network's tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        tensor = tensor if type(tensor) in (torch.Tensor, nn.Parameter) else tensor.dequantize()  # torchao's classes
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # bfloat16 too
    return digest.hexdigest()
