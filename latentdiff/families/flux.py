"""Flux.1, dev and schnell: a transformer on a straight path, a KL autoencoder of 16 channels, CLIP and T5 (Black Forest
Labs 2024). dev is told its guidance, and its shift grows with the picture; schnell is distilled to four steps.
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

PARTS = {
    "vae": frozenset({"AutoencoderKL", "AutoencoderTiny"}),
    "transformer": frozenset({"FluxTransformer2DModel"}),
    "text_encoder": frozenset({"CLIPTextModel"}),
    "text_encoder_2": frozenset({"T5EncoderModel"}),
    "tokenizer": stable_diffusion.PARTS["tokenizer"],
    "tokenizer_2": frozenset({"T5Tokenizer", "T5TokenizerFast"}),
}
DEFAULTS = {"num_inference_steps": 28, "guidance_scale": 3.5}
DISTILLED = {"num_inference_steps": 4, "guidance_scale": 1.0}  # schnell, which no guidance is told


def load(directory: Path, variant: str | None) -> Model:
    """See Family."""
    from latentdiff.families.weights import load_clip_and_t5, load_flux, load_vae

    path, prediction, *_ = read_scheduler(directory)
    backbone: Any = load_flux(directory, variant)
    codec: Any = load_vae(directory / "vae", variant)
    texts: Any = load_clip_and_t5(directory, variant)
    _check(backbone, texts, codec, directory)
    usual = DEFAULTS if "guidance" in backbone.spec.reads else DISTILLED
    card = model_card(directory, path.T, variant, usual)
    parts = {
        "vae": codec.vae,
        "transformer": backbone.model,
        "text_encoder": texts.first.model,
        "tokenizer": texts.first.tokenizer,
        "text_encoder_2": texts.second.model,
        "tokenizer_2": texts.second.tokenizer,
    }
    return Model(backbone, texts, codec, path, prediction, card, TorchPlace("cpu"), FAMILY, parts)


def _check(backbone: Any, texts: Any, codec: Any, where: Path) -> None:
    """Raises ModelError if the networks do not fit together."""
    reads, config = backbone.spec.reads, texts.first.model.config
    given = {"tokens": texts.second.width, "pooled": int(config.hidden_size)}
    for name, width in given.items():
        if reads[name][-1] != width:
            raise ModelError(f"the transformer reads {name} of {reads[name][-1]}, the texts have {width} ({where})")
    if backbone.spec.inputs != codec.latent_channels:
        raise ModelError(
            f"a transformer of {backbone.spec.inputs} channels, latents of {codec.latent_channels} ({where})"
        )


def index(model: Model) -> dict[str, Any]:
    """See Family."""
    return {
        "_class_name": "FluxPipeline",
        "_diffusers_version": version("diffusers"),
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", type(model.parts["vae"]).__name__],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }


FAMILY = Family(
    "Flux.1",
    frozenset(f"Flux{task}" for task in stable_diffusion.TASKS),
    PARTS,
    frozenset(),
    load,
    stable_diffusion.save_transformer,
    index,
    DEFAULTS,
)
