"""Stable Diffusion 3 and 3.5: a multimodal transformer on a straight path, a KL autoencoder of 16 channels, two CLIPs
and T5 (Esser et al. 2024). T5 may be missing.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from latentdiff.core.errors import ModelError
from latentdiff.families import stable_diffusion
from latentdiff.families.card import model_card
from latentdiff.families.scheduler import read_scheduler
from latentdiff.model import Family, Model, TorchPlace

_CLIP, _T5 = "CLIPTextModelWithProjection", "T5EncoderModel"
_TOKENIZERS = stable_diffusion.PARTS["tokenizer"]
PARTS = {
    "vae": frozenset({"AutoencoderKL", "AutoencoderTiny"}),
    "transformer": frozenset({"SD3Transformer2DModel"}),
    "text_encoder": frozenset({_CLIP}),
    "text_encoder_2": frozenset({_CLIP}),
    "text_encoder_3": frozenset({_T5}),
    "tokenizer": _TOKENIZERS,
    "tokenizer_2": _TOKENIZERS,
    "tokenizer_3": frozenset({"T5Tokenizer", "T5TokenizerFast"}),
}
DEFAULTS = {"num_inference_steps": 28, "guidance_scale": 7.0, "spacing": "linspace"}


def load(directory: Path, variant: str | None) -> Model:
    """See Family."""
    from latentdiff.families.weights import load_mmdit, load_three_texts, load_vae

    path, prediction, *_ = read_scheduler(directory)
    backbone: Any = load_mmdit(directory, variant)
    codec: Any = load_vae(directory / "vae", variant)
    width = backbone.spec.reads["tokens"][-1]
    texts = load_three_texts(directory, width, variant)
    card = model_card(directory, path.T, variant, DEFAULTS)
    _check(backbone, texts, codec, directory)
    parts = parts_of(backbone, texts, codec)
    return Model(backbone, texts, codec, path, prediction, card, TorchPlace("cpu"), FAMILY, parts)


def _check(backbone: Any, texts: Any, codec: Any, where: Path) -> None:
    """Raises ModelError if the networks do not fit together."""
    spec, widths = backbone.spec, [int(encoder.model.config.projection_dim) for encoder in texts.encoders]
    if spec.inputs != codec.latent_channels:
        raise ModelError(f"a transformer of {spec.inputs} channels, latents of {codec.latent_channels} ({where})")
    if spec.reads["pooled"] != (sum(widths),):
        raise ModelError(
            f"the transformer reads pooled of {spec.reads['pooled'][0]}, texts have {sum(widths)} ({where})"
        )
    hidden = sum(int(encoder.model.config.hidden_size) for encoder in texts.encoders)
    if hidden > texts.width or (texts.third is not None and texts.third.width != texts.width):
        raise ModelError(f"the transformer reads tokens of {texts.width}, which the texts do not have ({where})")


def parts_of(backbone: Any, texts: Any, codec: Any) -> dict[str, Any]:
    """diffusers' names -> the libraries' modules and tokenizers."""
    parts = {"vae": codec.vae, "transformer": backbone.model}
    encoders = [*texts.encoders, *([] if texts.third is None else [texts.third])]
    for encoder, suffix in zip(encoders, ("", "_2", "_3"), strict=False):
        parts |= {f"text_encoder{suffix}": encoder.model, f"tokenizer{suffix}": encoder.tokenizer}
    return parts


def index(model: Model) -> dict[str, Any]:
    """See Family."""
    has_t5 = "text_encoder_3" in model.parts
    return {
        "_class_name": "StableDiffusion3Pipeline",
        "_diffusers_version": version("diffusers"),
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", type(model.parts["vae"]).__name__],
        "text_encoder": ["transformers", _CLIP],
        "text_encoder_2": ["transformers", _CLIP],
        "text_encoder_3": ["transformers", _T5] if has_t5 else [None, None],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": ["transformers", "T5TokenizerFast"] if has_t5 else [None, None],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }


FAMILY = Family(
    "Stable Diffusion 3",
    frozenset(f"StableDiffusion3{task}" for task in stable_diffusion.TASKS),
    PARTS,
    frozenset({"text_encoder_3", "tokenizer_3"}),
    load,
    stable_diffusion.save_transformer,
    index,
    DEFAULTS,
)
