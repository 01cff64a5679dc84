"""Stable Diffusion 3 and 3.5: a multimodal transformer on a straight path, a KL autoencoder of 16 channels, two CLIPs
and T5 (Esser et al. 2024). T5 may be missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentdiff.families import flow, layouts, stable_diffusion
from latentdiff.model import EMPTY, Family, Layout, Model

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


def load(directory: Path, variant: str | None, states: Mapping[str, Any] = EMPTY) -> Model:
    """See Family and Layout."""
    import diffusers

    from latentdiff.families.weights import load_vae, pretrained
    from latentdiff.networks.backbones.mmdit import MMDiT

    backbone: Any = MMDiT(
        pretrained(diffusers.SD3Transformer2DModel, directory, "transformer", variant, MMDiT, states)
    ).eval()
    texts: Any = load_texts(directory, backbone.spec.reads["tokens"][-1], variant, states)
    third = [] if texts.third is None else [texts.third]
    parts: dict[str, Any] = {}
    for encoder, suffix in zip([*texts.encoders, *third], ("", "_2", "_3"), strict=False):
        parts |= {f"text_encoder{suffix}": encoder.model, f"tokenizer{suffix}": encoder.tokenizer}
    configs = [encoder.model.config for encoder in texts.encoders]
    return flow.assembled(
        backbone,
        texts,
        load_vae(directory / "vae", variant, states),
        directory,
        family=FAMILY,
        widths={"tokens": _tokens(texts, configs), "pooled": sum(int(config.projection_dim) for config in configs)},
        parts=parts,
        states=states,
        variant=variant,
    )


def load_texts(directory: Path, width: int, variant: str | None = None, states: Mapping[str, Any] = EMPTY) -> Any:
    """The text encoders; T5 may be missing. width: of the tokens that the backbone reads."""
    from transformers import CLIPTextModelWithProjection

    from latentdiff.families.weights import clip_text, load_t5
    from latentdiff.networks.encoders.reading import T5_LENGTH
    from latentdiff.networks.encoders.three_texts import ThreeTextEncoders

    first = clip_text(CLIPTextModelWithProjection, directory, variant, "", penultimate=True, states=states)
    second = clip_text(CLIPTextModelWithProjection, directory, variant, "_2", penultimate=True, states=states)
    third = load_t5(directory, "_3", T5_LENGTH, variant, states) if (directory / "text_encoder_3").is_dir() else None
    return ThreeTextEncoders(first, second, third, width).eval()


def _tokens(texts: Any, configs: list[Any]) -> int:
    """The width of the tokens: T5's, to which the CLIPs' are filled up. Without T5 any width that holds them."""
    clips = sum(int(config.hidden_size) for config in configs)
    return max(clips, int(texts.width if texts.third is None else texts.third.width))


def index(model: Model) -> dict[str, Any]:
    """See Family."""
    absent = {} if "text_encoder_3" in model.parts else {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    return flow.index(model, "StableDiffusion3Pipeline", **absent)


def converted(state: dict[str, Any]) -> dict[str, Any]:
    """See Layout."""
    from diffusers.loaders import single_file_utils

    return dict(single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(state))


FAMILY = Family(
    "Stable Diffusion 3",
    frozenset(f"StableDiffusion3{task}" for task in stable_diffusion.TASKS),
    PARTS,
    frozenset({"text_encoder_3", "tokenizer_3"}),
    load,
    stable_diffusion.save_transformer,
    index,
    lambda directory: DEFAULTS,
    Layout(layouts.stable_diffusion_3, converted, load),
)
