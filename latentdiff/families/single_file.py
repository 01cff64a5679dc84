"""One .safetensors file in the original layout of Stable Diffusion 1, 2 and XL.

Every config is inferred from the names and shapes of the weights; diffusers' own functions convert the names. Shapes do
not show the number of heads (8 in Stable Diffusion 1, channels / 64 later), the layer of OpenCLIP that is read (the
last but one), and whether a Stable Diffusion 2 predicts noise or velocity, which is measured.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils as conversion
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from latentdiff.core.errors import ModelError, loading
from latentdiff.core.files import sha256_of
from latentdiff.diffusion.path import VariancePreserving
from latentdiff.families import stable_diffusion, stable_diffusion_xl
from latentdiff.families.parts import transformer_in
from latentdiff.families.stable_diffusion import OF_LCM, assembled
from latentdiff.families.stable_diffusion_xl import DEFAULTS as OF_XL
from latentdiff.formats.gguf_file import is_gguf, shapes_in, types_in
from latentdiff.formats.original import (
    CLIP,
    EMA,
    OPEN_CLIP,
    POSITIONS,
    SCALING,
    UNET,
    VAE,
    VOCABULARY,
    Kind,
    unet_name,
)
from latentdiff.formats.pickle import check_safetensors
from latentdiff.formats.tensors import unscaled, widened
from latentdiff.model import Model, ModelCard
from latentdiff.networks.backbones.unet import UNet
from latentdiff.networks.codecs.absent import AbsentCodec
from latentdiff.networks.codecs.kl import KLAutoencoder, without_encoder
from latentdiff.networks.conditions import stacked
from latentdiff.networks.encoders.clip import TextEncoder, clip_tokenizer
from latentdiff.networks.encoders.prompt import Prompt
from latentdiff.networks.encoders.second_clip import SecondTextEncoder
from latentdiff.networks.encoders.two_clips import TwoTextEncoders
from latentdiff.networks.quiet import quietly
from latentdiff.networks.with_weights import with_weights

State = dict[str, Tensor]
AnyTexts = TextEncoder | TwoTextEncoders | SecondTextEncoder
SIDES = {"1": 64, "2": 64, "XL": 128, "XL refiner": 128}  # of latents; Stable Diffusion 2 of velocity: 96
LAST_TIME = 999  # of the 1,000 that these models were trained on
GUIDANCE = "time_embed.cond_proj.weight"  # of distilled models that read it
OPEN_CLIP_H = (1024, 23)  # width -> the layers that are read, of 24; some files omit the last


_OTHER_KINDS = {  # weights by which models of SDXL's shape but of another path are known
    "edm_vpred.sigma_max": "CosXL",
    "edm_vpred.sigma_min": "CosXL",
    "edm_mean": "Playground 2.5",
    "edm_std": "Playground 2.5",
}
_HINTS = {"": "epsilon", "eps": "epsilon", "noise": "epsilon", "x0": "sample"}  # metadata's words -> predictions
_XL: dict[str, Any] = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 56,
}
_PLAIN: dict[str, Any] = {
    "sampler": "dpmpp_2m",
    "spacing": "trailing",
}  # recommended: no file says


def load_single_file(path: Path) -> Model:
    """A model in evaluation mode, in the precision of the file. Raises ModelError, UnsafeError."""
    check_file(path)
    transformer = transformer_in(path)
    if transformer is not None or is_gguf(path):
        what = "one network" if transformer is None else f"the transformer of {transformer.family.name}"
        raise ModelError(
            f"{path} holds {what} and no tokenizer. Join it with a folder of this "
            f"family: latentdiff convert {path} OUTPUT --base FOLDER"
        )
    with loading(path), quietly():  # diffusers advises a flag of its own scripts
        state = _with_averages(unscaled(load_file(path)))
        kind = _kind_of(state, path)
        config = unet_config(state, kind)
        unet = UNet(with_weights(UNet2DConditionModel, config, _unet(state, config))).eval()
        codec: Any = AbsentCodec(SCALING[kind])
        if any(name.startswith(VAE) for name in state):
            codec = KLAutoencoder(_vae(state, kind)).eval()
        texts = _text_encoder(state, kind).eval()
    prediction, zero_terminal_snr = _prediction(path, state, kind, unet, texts)
    if kind == "2" and prediction == "v_prediction":
        unet.model.register_to_config(sample_size=96)
    schedule = VariancePreserving.scaled_linear()
    side = int(unet.model.config.sample_size) * codec.factor
    model = assembled(
        unet,
        texts,
        codec,
        path=schedule.zero_terminal_snr() if zero_terminal_snr else schedule,
        prediction=prediction,
        card=ModelCard(path.stem, sha256_of(path), (side, side), _usual(kind, config)),
        where=path,
    )
    family = stable_diffusion_xl if _is_large(kind) else stable_diffusion
    return replace(model, family=family.FAMILY)


def _usual(kind: Kind, config: dict[str, Any]) -> dict[str, Any]:
    """The recommended settings of a file, which states none."""
    if "time_cond_proj_dim" in config:
        return {"sampler": "lcm", "spacing": "distilled", **OF_LCM}
    return _PLAIN | OF_XL if _is_large(kind) else dict(_PLAIN)


def _unet(state: State, config: dict[str, Any]) -> State:
    """The U-Net's weights under diffusers' names; its conversion omits the layer that reads the guidance."""
    weights: State = conversion.convert_ldm_unet_checkpoint(state, config)
    if (guidance := state.get(f"{UNET}{GUIDANCE}")) is not None:
        weights["time_embedding.cond_proj.weight"] = guidance
    return weights


def _vae(state: State, kind: Kind) -> AutoencoderKL:
    config = vae_config(state, kind)
    weights = conversion.convert_ldm_vae_checkpoint(state, config)
    with torch.device("meta"):
        vae = AutoencoderKL(**config)
    weights = {name: widened(tensor) for name, tensor in weights.items()}
    if not any(name.startswith("encoder.") for name in weights):
        without_encoder(vae)
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("quant_conv.")}
    vae.load_state_dict(weights, assign=True)
    return vae


def load_vae_file(path: Path, scale: float) -> KLAutoencoder:
    """A VAE from a .safetensors file: the original layout, alone or in a checkpoint, or diffusers' names.

    scale: of its latents, which no file holds. Raises ModelError, UnsafeError.
    """
    check_file(path)
    with loading(path):
        state = load_file(path)
        if not any(name.startswith(VAE) for name in state):
            state = {VAE + name.removeprefix("vae."): tensor for name, tensor in state.items()}
        if any(".down_blocks." in name or ".up_blocks." in name for name in state):
            raise ModelError("it has diffusers' names without their config. Name the folder of the VAE")
        if not any(".decoder." in f".{name}" for name in state):
            raise ModelError("there is no VAE in it")
        vae = _vae(state, "1")
    vae.register_to_config(scaling_factor=scale)
    return KLAutoencoder(vae).eval()


def _with_averages(state: State) -> State:
    """The weights by their usual names; if a file has only averages (`model_ema.` and a name without dots), those."""
    if any(name.startswith(UNET) for name in state) or not any(name.startswith(EMA) for name in state):
        return state
    names = {name.replace(".", ""): name for name in _original_names()}
    averages = {
        UNET + names[flat]: tensor
        for name, tensor in state.items()
        if (flat := name.removeprefix(EMA)) in names and name.startswith(EMA)
    }
    return {name: tensor for name, tensor in state.items() if not name.startswith("model_ema.")} | averages


def _original_names() -> set[str]:
    """The names of every weight that a U-Net of Stable Diffusion 1, 2 or XL has in the original layout."""
    names: set[str] = set()
    for depths, layers, added in (((1, 1, 1, 0), 2, {}), ((1, 2, 10), 3, _XL)):
        levels = len(depths)
        with torch.device("meta"):
            unet = UNet2DConditionModel(
                block_out_channels=tuple(32 * (level + 1) for level in range(levels)),  # all with a shortcut
                layers_per_block=layers,
                down_block_types=tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths),
                up_block_types=tuple("CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)),
                transformer_layers_per_block=tuple(max(depth, 1) for depth in depths),
                cross_attention_dim=32,
                **added,
            )
        for shorter in range(1, layers + 1):  # with fewer blocks a level the numbers differ
            config = SimpleNamespace(**{**dict(unet.config), "layers_per_block": shorter})
            for name in unet.state_dict():
                with suppress(KeyError):
                    names.add(unet_name(name, config))
    return names


def check_file(path: Path) -> None:
    """Refuse what is neither a safetensors nor a GGUF file, by content. Raises ModelError, UnsafeError."""
    if not path.is_file():
        raise ModelError(f"no such file ({path})")
    if is_gguf(path):
        return
    check_safetensors(path, ". `latentdiff convert --trust-pickle` converts it")
    with loading(path), safe_open(path, "pt"):
        pass


def described(path: Path) -> dict[str, Any]:
    """A description of a file from its header: kind, sizes, metadata. Raises ModelError, UnsafeError."""
    check_file(path)
    metadata: dict[str, str] = {}
    if is_gguf(path):
        shapes, kinds = shapes_in(path), types_in(path)
        names, counts = list(shapes), list(map(math.prod, shapes.values()))
    else:
        with loading(path), safe_open(path, "pt") as file:
            names, metadata = list(file.keys()), dict(file.metadata() or {})
            counts = [math.prod(file.get_slice(name).get_shape()) for name in names]
            kinds = sorted({file.get_slice(name).get_dtype() for name in names})
    transformer = transformer_in(path)
    return {
        "name": path.stem,
        "kind": _kind(names, path) if transformer is None else f"{transformer.family.name}, transformer",
        "hash": sha256_of(path),
        "tensors": len(names),
        "parameters": sum(counts),
        "precision": kinds,
        "metadata": {key: value[:200] for key, value in metadata.items()},
    }


def _kind(names: Sequence[str], path: Path) -> str:
    """The kind of file: a family of models, or a format of adapters."""
    if any(name.startswith(UNET) for name in names):
        return f"Stable Diffusion {_kind_of(names, path)}, original layout"
    if {"emb_params", "clip_l", "clip_g"} & {*names} or (names and all(re.fullmatch(r"<.+>", name) for name in names)):
        return "learnt words"
    if any(name.startswith("ip_adapter.") for name in names):
        return "IP-Adapter"
    if any("input_hint_block." in name or "controlnet_cond_embedding." in name for name in names):
        return "ControlNet"
    if not _of_adapter(names):
        return "weights"
    return "adapter, " + (
        "kohya's names" if any(n.startswith("lora_") for n in names) else "PEFT's or diffusers' names"
    )


def _of_adapter(names: Sequence[str]) -> bool:
    return any("lora" in name for name in names) and not any(name.startswith(UNET) for name in names)


def _kind_of(state: Iterable[str], path: Path) -> Kind:
    state = list(state)
    for name, kind in _OTHER_KINDS.items():
        if name in state:
            raise ModelError(f"{kind} is not supported: it is trained on another path ({path} has {name})")
    if _of_adapter(state):
        raise ModelError(f"{path} is an adapter, not a model. Load it with --lora, convert it with --to")
    if not any(name.startswith(UNET) for name in state):
        raise ModelError(f"no U-Net under {UNET}* ({path}). Give a complete Stable Diffusion checkpoint")
    held = {prefix for prefix in (*CLIP.values(), *OPEN_CLIP.values()) if any(n.startswith(prefix) for n in state)}
    kinds: dict[frozenset[str], Kind] = {
        frozenset({CLIP["1"]}): "1",
        frozenset({OPEN_CLIP["2"]}): "2",
        frozenset({CLIP["XL"], OPEN_CLIP["XL"]}): "XL",
        frozenset({OPEN_CLIP["XL refiner"]}): "XL refiner",
    }
    if frozenset(held) not in kinds:
        raise ModelError(f"text encoders of no Stable Diffusion 1, 2 or XL ({path}: {sorted(held) or 'none'})")
    return kinds[frozenset(held)]


def unet_config(state: State, kind: Kind) -> dict[str, Any]:
    """The U-Net's config, from the shapes of its input blocks: a downsampling begins the next level."""
    weights = {name.removeprefix(UNET): tensor for name, tensor in state.items() if name.startswith(UNET)}
    levels: list[list[tuple[int, int]]] = [[]]  # channels and depth of attention of each residual block
    for block in range(1, _count(weights, r"input_blocks\.(\d+)\.")):
        if f"input_blocks.{block}.0.op.weight" in weights:
            levels.append([])
        else:
            depth = _count(weights, rf"input_blocks\.{block}\.1\.transformer_blocks\.(\d+)\.")
            levels[-1].append((weights[f"input_blocks.{block}.0.out_layers.3.weight"].shape[0], depth))
    if len({len(level) for level in levels}) != 1:
        raise ModelError("its U-Net has different numbers of blocks at its levels")
    channels, depths = [level[0][0] for level in levels], [level[0][1] for level in levels]
    middle = _count(weights, r"middle_block\.1\.transformer_blocks\.(\d+)\.")
    keys = [name for name in weights if name.endswith("attn2.to_k.weight")]
    later = kind != "1"
    config: dict[str, Any] = {
        "sample_size": SIDES[kind],
        "in_channels": weights["input_blocks.0.0.weight"].shape[1],
        "out_channels": weights["out.2.weight"].shape[0],
        "block_out_channels": tuple(channels),
        "layers_per_block": len(levels[0]),
        "down_block_types": tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths),
        "up_block_types": tuple("CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)),
        "transformer_layers_per_block": (*(max(depth, 1) for depth in depths[:-1]), max(depths[-1], middle)),
        "cross_attention_dim": weights[keys[0]].shape[1],
        "attention_head_dim": tuple(max(c // 64, 1) for c in channels) if later else 8,  # diffusers' name for heads
        "use_linear_projection": later,
    }
    if GUIDANCE in weights:
        config["time_cond_proj_dim"] = weights[GUIDANCE].shape[1]
    if _is_large(kind):
        config["addition_embed_type"] = "text_time"
        config["addition_time_embed_dim"] = 256
        config["projection_class_embeddings_input_dim"] = weights["label_emb.0.0.weight"].shape[1]
    return config


def vae_config(state: State, kind: Kind) -> dict[str, Any]:
    """The autoencoder's config, from the shapes of its decoder: some files have no encoder. Raises ModelError."""
    if f"{VAE}decoder.conv_in.weight" not in state:
        raise ModelError("its VAE has no decoder")
    for numbered in (r"down\.(\d+)\.", r"down\.\d+\.block\.(\d+)\."):
        _count(state, rf"{re.escape(VAE)}encoder\.{numbered}")
    levels = _count(state, rf"{re.escape(VAE)}decoder\.up\.(\d+)\.")
    return {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": tuple(
            state[f"{VAE}decoder.up.{level}.block.0.conv2.weight"].shape[0] for level in range(levels)
        ),
        "layers_per_block": _count(state, rf"{re.escape(VAE)}decoder\.up\.0\.block\.(\d+)\.") - 1,
        "latent_channels": state[f"{VAE}decoder.conv_in.weight"].shape[1],
        "scaling_factor": SCALING[kind],
        "sample_size": 8 * SIDES[kind],
    }


def _is_large(kind: Kind) -> bool:
    """Whether a file is Stable Diffusion XL's or its refiner's."""
    return kind in ("XL", "XL refiner")


def _text_encoder(state: State, kind: Kind) -> AnyTexts:
    if kind == "1":
        return _clip(state, kind)
    if kind == "2":
        return _open_clip(state, kind)
    if kind == "XL refiner":
        return SecondTextEncoder(_open_clip(state, kind))
    return TwoTextEncoders(_clip(state, kind), _open_clip(state, kind), zero_empty=True)


def _clip(state: State, kind: Kind) -> TextEncoder:
    """OpenAI's ViT-L, which is in the file under transformers' names."""
    names = conversion.convert_ldm_clip_checkpoint(state, CLIP[kind])
    weights = _bare(names)
    weights.pop("embeddings.position_ids", None)
    weights.pop("text_projection.weight", None)
    model = _filled_text(CLIPTextModel, text_config(weights, "quick_gelu"), weights)
    return TextEncoder(clip_tokenizer(77), model, penultimate=kind == "XL")


def _open_clip(state: State, kind: Kind) -> TextEncoder:
    """OpenCLIP's H of Stable Diffusion 2, without its last layer, or bigG of XL with its projection."""
    prefix = OPEN_CLIP[kind]
    width = state[f"{prefix}ln_final.weight"].shape[0]
    weights = conversion.convert_open_clip_checkpoint(
        SimpleNamespace(config=SimpleNamespace(hidden_size=width)), state, prefix=prefix
    )
    if _is_large(kind):
        config = text_config(_bare(weights), "gelu", projection_dim=weights["text_projection.weight"].shape[0])
        model = _filled_text(CLIPTextModelWithProjection, config, weights)
        return TextEncoder(clip_tokenizer(77, pad="!"), model, penultimate=True)
    layers = _count(state, rf"{re.escape(prefix)}transformer\.resblocks\.(\d+)\.")
    read = OPEN_CLIP_H[1] if width == OPEN_CLIP_H[0] else layers - 1
    weights = _bare(weights)
    weights.pop("text_projection.weight", None)
    weights = {name: tensor for name, tensor in weights.items() if _layer(name) < read}
    return TextEncoder(clip_tokenizer(77, pad="!"), _filled_text(CLIPTextModel, text_config(weights, "gelu"), weights))


def _bare(weights: State) -> State:
    """The weights under the names of a text transformer without a projection."""
    return {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}


def _layer(name: str) -> int:
    match = re.match(r"encoder\.layers\.(\d+)\.", name)
    return int(match[1]) if match else -1


def text_config(weights: State, activation: str, **more: Any) -> CLIPTextConfig:
    """A CLIP text transformer's config, from its weights under transformers' names."""
    vocabulary, width = weights["embeddings.token_embedding.weight"].shape
    positions = weights["embeddings.position_embedding.weight"].shape[0]
    if (vocabulary, positions) != (VOCABULARY, POSITIONS):
        raise ModelError(f"its text encoder has {vocabulary} words and {positions} positions, unlike CLIP's")
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=weights["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_count(weights, r"encoder\.layers\.(\d+)\."),
        num_attention_heads=max(width // 64, 1),
        max_position_embeddings=positions,
        hidden_act=activation,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=49407 if activation == "quick_gelu" else 0,
        **more,
    )


def _filled_text(network: Any, config: CLIPTextConfig, state: State) -> Any:
    with torch.device("meta"):
        model = network(config)
    model.load_state_dict(state, assign=True)
    embeddings = getattr(model, "text_model", model).embeddings
    embeddings.position_ids = torch.arange(config.max_position_embeddings)[None]  # no file holds it
    return model


def _count(weights: State, pattern: str) -> int:
    """The number of different indices in the names at the pattern's group. Raises ModelError if one is missing."""
    numbers = {int(match[1]) for name in weights if (match := re.match(pattern, name))}
    if numbers and max(numbers) != len(numbers) - 1:
        raise ModelError(f"its names are numbered up to {max(numbers)}, but there are only {len(numbers)} ({pattern})")
    return len(numbers)


def _prediction(path: Path, state: State, kind: Kind, unet: UNet, text_encoder: AnyTexts) -> tuple[str, bool]:
    """The U-Net's prediction, and whether it was trained with zero terminal SNR.

    Files that differ from their family's usual kind say so with an empty weight of that name, or in their metadata. A
    name that is not known here is returned as it is; drawing then requires the setting `prediction`.
    """
    with safe_open(path, "pt") as file:
        metadata = {key.lower(): value.strip().lower() for key, value in (file.metadata() or {}).items()}
    hint = metadata.get("modelspec.prediction_type") or metadata.get("prediction_type") or ""
    hint = hint.replace("-", "_").replace("prediction", "").strip("_")
    if metadata.get("ss_v_parameterization") == "true":
        hint = "v"
    if "v_pred" in state or hint == "v":
        return "v_prediction", "ztsnr" in state
    if hint or kind != "2":
        return _HINTS.get(hint, hint[:40]), "ztsnr" in state
    return ("epsilon" if predicts_noise(unet, text_encoder) else "v_prediction"), "ztsnr" in state


@torch.no_grad()
def predicts_noise(unet: UNet, text_encoder: AnyTexts) -> bool:
    """Whether the output at the last time correlates with the input.

    There x_t is nearly noise, which an epsilon network returns; the velocity is about -x0, which is independent of it.
    """
    generator = torch.Generator().manual_seed(0)
    model = unet.model
    side = 2 ** (len(model.config.block_out_channels) - 1) * 2
    x = torch.randn(1, model.config.in_channels, side, side, generator=generator).to(model.dtype)
    output = unet(x, LAST_TIME, stacked([text_encoder.encode(Prompt(""))])).float()
    noise = x[:, : output.shape[1]].float()
    return bool(torch.corrcoef(torch.stack([output.flatten(), noise.flatten()]))[0, 1] > 0.5)
