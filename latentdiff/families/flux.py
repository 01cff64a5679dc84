"""Flux.1, dev, schnell and Kontext: a transformer on a straight path, a KL autoencoder of 16 channels, CLIP and T5.

dev reads its guidance, and its shift grows with the picture; schnell is distilled to four steps (Black Forest Labs
2024). Kontext, whose weights have dev's shapes, is recognised by its pipeline's class; it edits an input picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentdiff.families import flow, layouts, stable_diffusion
from latentdiff.formats.folder import read_index, read_json
from latentdiff.model import EMPTY, Family, Layout, Model

PARTS = {
    "vae": frozenset({"AutoencoderKL", "AutoencoderTiny"}),
    "transformer": frozenset({"FluxTransformer2DModel"}),
    "text_encoder": frozenset({"CLIPTextModel"}),
    "text_encoder_2": frozenset({"T5EncoderModel"}),
    "tokenizer": stable_diffusion.PARTS["tokenizer"],
    "tokenizer_2": frozenset({"T5Tokenizer", "T5TokenizerFast"}),
}
KONTEXT = frozenset({"FluxKontextPipeline", "FluxKontextInpaintPipeline"})
T5_LENGTH = 512  # tokens that T5 reads
DEFAULTS = {"num_inference_steps": 28, "guidance_scale": 3.5}
DISTILLED = {"num_inference_steps": 4, "guidance_scale": 1.0}  # schnell, which reads no guidance


def load(directory: Path, variant: str | None, states: Mapping[str, Any] = EMPTY) -> Model:
    """See Family and Layout."""
    import diffusers

    from latentdiff.families.weights import load_t5, load_text_encoder, load_vae, pretrained
    from latentdiff.networks.backbones.flux import Flux, Kontext
    from latentdiff.networks.encoders.clip_and_t5 import ClipAndT5

    network = Kontext if read_index(directory).get("_class_name") in KONTEXT else Flux
    backbone: Any = network(
        pretrained(diffusers.FluxTransformer2DModel, directory, "transformer", variant, Flux, states)
    ).eval()
    clip, t5 = load_text_encoder(directory, variant, states), load_t5(directory, "_2", T5_LENGTH, variant, states)
    return flow.assembled(
        backbone,
        ClipAndT5(clip, t5).eval(),
        load_vae(directory / "vae", variant, states),
        directory,
        family=FAMILY,
        widths={"tokens": t5.width, "pooled": int(clip.model.config.hidden_size)},
        parts={
            "text_encoder": clip.model,
            "tokenizer": clip.tokenizer,
            "text_encoder_2": t5.model,
            "tokenizer_2": t5.tokenizer,
        },
        states=states,
        variant=variant,
    )


def defaults(directory: Path) -> Mapping[str, Any]:
    """See Family."""
    return DEFAULTS if read_json(directory / "transformer" / "config.json").get("guidance_embeds") else DISTILLED


def index(model: Model) -> dict[str, Any]:
    """See Family."""
    pipeline = "FluxKontextPipeline" if model.edits else "FluxPipeline"
    return flow.index(model, pipeline, feature_extractor=[None, None], image_encoder=[None, None])


def converted(state: dict[str, Any]) -> dict[str, Any]:
    """See Layout."""
    from diffusers.loaders import single_file_utils

    return dict(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers(state))


FAMILY = Family(
    "Flux.1",
    frozenset(f"Flux{task}" for task in stable_diffusion.TASKS) | KONTEXT,
    PARTS,
    frozenset(),
    load,
    stable_diffusion.save_transformer,
    index,
    defaults,
    Layout(layouts.flux, converted, load),
)
