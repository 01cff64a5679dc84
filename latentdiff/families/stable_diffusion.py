"""Stable Diffusion 1 and 2, and their inpainting models: a U-Net, a KL autoencoder and one CLIP text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from latentdiff.core.errors import ModelError
from latentdiff.families.card import model_card
from latentdiff.families.scheduler import read_scheduler
from latentdiff.formats.folder import read_json
from latentdiff.model import Enlarging, Family, Model, TorchPlace

TASKS = ("Pipeline", "Img2ImgPipeline", "InpaintPipeline")
EDIT = "StableDiffusionInstructPix2PixPipeline"
LCM = "LatentConsistencyModelPipeline"  # its U-Net reads the guidance
OWN = "LatentDiffusionPipeline"  # of networks that diffusers does not know
OF_LCM: Mapping[str, Any] = {"num_inference_steps": 4, "guidance_scale": 8.5}
_TOKENIZERS = frozenset({"CLIPTokenizer", "CLIPTokenizerFast"})
PARTS: Mapping[str, frozenset[str]] = {
    "vae": frozenset({"AutoencoderKL", "AutoencoderTiny"}),
    "unet": frozenset({"UNet2DConditionModel"}),
    "text_encoder": frozenset({"CLIPTextModel"}),
    "tokenizer": _TOKENIZERS,
}
PARTS_OF_TWO: Mapping[str, frozenset[str]] = {
    **PARTS,
    "text_encoder_2": frozenset({"CLIPTextModelWithProjection"}),
    "tokenizer_2": _TOKENIZERS,
}


def load(directory: Path, variant: str | None) -> Model:
    """See Family."""
    return replace(read(directory, variant, defaults(directory)), family=FAMILY)


def defaults(directory: Path) -> Mapping[str, Any]:
    """See Family."""
    config = read_json(directory / "unet" / "config.json")
    return OF_LCM if config.get("time_cond_proj_dim") and "time_cond" not in config else {}


def read(
    directory: Path,
    variant: str | None,
    defaults: Mapping[str, Any] = MappingProxyType({}),
    enlarging: Enlarging | None = None,
) -> Model:
    """The networks of a checked folder as a model whose family is not set yet."""
    from latentdiff.families.weights import load_codec, load_text_encoders, load_unet

    path, prediction, *_ = read_scheduler(directory)
    codec, texts = load_codec(directory, variant), load_text_encoders(directory, variant)
    unet = load_unet(directory, variant)
    card = model_card(directory, path.T, variant, defaults)
    facts: dict[str, Any] = {
        "path": path,
        "prediction": prediction,
        "card": card,
        "where": directory,
        "enlarging": enlarging,
    }
    return assembled(unet, texts, codec, **facts)


def assembled(
    unet: Any,
    texts: Any,
    codec: Any,
    *,
    path: Any,
    prediction: str,
    card: Any,
    where: Path,
    enlarging: Enlarging | None = None,
) -> Model:
    """A model without a family, from networks. Raises ModelError if they do not fit together."""
    from latentdiff.networks.encoders.second_clip import SecondTextEncoder
    from latentdiff.networks.encoders.two_clips import TwoTextEncoders

    latents, inputs = codec.latent_channels, unet.spec.inputs
    sized = isinstance(texts, TwoTextEncoders | SecondTextEncoder)
    if (enlarging is not None) != ("label" in unet.spec.reads):
        raise ModelError(f"only an upscaler has a U-Net that reads class labels, and it requires one ({where})")
    if enlarging is not None:
        if inputs != latents + codec.image_channels:
            raise ModelError(f"a U-Net that enlarges must read {latents} + {codec.image_channels} channels ({where})")
    elif inputs not in (latents, 2 * latents + 1) and (sized or inputs != 2 * latents):
        raise ModelError(f"a U-Net that reads {inputs} channels does not fit latents of {latents} ({where})")
    if ("sizes" in unet.spec.reads) != sized:
        raise ModelError(f"a U-Net of SDXL requires two text encoders, others require one ({where})")
    _check_widths(unet, texts, where)
    parts = parts_of(unet, texts, codec)
    place = TorchPlace("cpu")
    return Model(unet, texts, codec, path, prediction, card, place, parts=parts, enlarging=enlarging)


def _check_widths(unet: Any, texts: Any, where: Path) -> None:
    """Check that the U-Net reads what the text encoders give. Raises ModelError."""
    configs = [encoder.model.config for encoder in texts.encoders]
    widths = {"tokens": sum(int(config.hidden_size) for config in configs)}
    if "pooled" in unet.spec.reads:
        widths["pooled"] = int(configs[-1].projection_dim)
    for name, width in widths.items():
        if unet.spec.reads[name][-1] != width:
            raise ModelError(f"the U-Net reads {name} of {unet.spec.reads[name][-1]}, the texts have {width} ({where})")


def parts_of(unet: Any, texts: Any, codec: Any) -> dict[str, Any]:
    """diffusers' names -> the libraries' modules and tokenizers."""
    parts = {"vae": getattr(codec, "vae", None), "unet": unet.model}
    for encoder, suffix in zip(texts.encoders, getattr(texts, "suffixes", ("", "_2")), strict=False):
        parts |= {f"text_encoder{suffix}": encoder.model, f"tokenizer{suffix}": encoder.tokenizer}
    return {name: part for name, part in parts.items() if part is not None}


def save(model: Model, directory: Path, backbone: str = "unet") -> None:
    """See Family. backbone: the name of its part."""
    networks: Any = model
    networks.backbone.save(directory / backbone)
    networks.encoder.save(directory)
    networks.codec.save(directory / "vae")


def save_transformer(model: Model, directory: Path) -> None:
    """See Family, for families whose backbone is a transformer."""
    save(model, directory, "transformer")


def index(model: Model) -> dict[str, Any]:
    """See Family."""
    return {
        "_class_name": _pipeline(model),
        **shared_index(model),
        "safety_checker": [None, None],
        "requires_safety_checker": False,
    }


def _pipeline(model: Model) -> str:
    """diffusers' class for a model."""
    if model.edits:
        return EDIT
    if "until" in model.backbone.spec.reads:  # diffusers would draw it wrongly
        return OWN
    if model.inpaints:
        return "StableDiffusionInpaintPipeline"
    return LCM if model.reads_guidance else "StableDiffusionPipeline"


def shared_index(model: Model) -> dict[str, Any]:
    """The entries of model_index.json that Stable Diffusion and Stable Diffusion XL share."""
    vae = model.parts.get("vae")
    return {
        "_diffusers_version": version("diffusers"),
        "vae": [None, None] if vae is None else ["diffusers", type(vae).__name__],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }


def unscaled(model: Model, latents: Any) -> Any:
    """See Family.context: InstructPix2Pix reads latents as the VAE gives them, without their scale."""
    return latents / getattr(model.codec, "scale", 1.0)


def architecture(model: Model) -> str:
    """See Family: the version, by the width of its text encoder; models trained here have widths of their own."""
    second = "v2-768-v" if model.prediction == "v_prediction" else "v2-512"
    versions = {768: "v1", 1024: second}
    return f"stable-diffusion-{versions.get(model.backbone.spec.reads['tokens'][-1] or 0, 'of-its-own')}"


FAMILY = Family(
    "Stable Diffusion",
    frozenset(f"StableDiffusion{task}" for task in TASKS) | {EDIT, LCM, OWN, "LatentConsistencyModelImg2ImgPipeline"},
    PARTS,
    frozenset({"vae"}),
    load,
    save,
    index,
    defaults,
    architecture=architecture,
    context=unscaled,
)
