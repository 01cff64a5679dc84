"""FLUX.2 klein: a transformer on a straight path, an autoencoder of 128 normalised channels, and Qwen3, of which three
layers are read (Black Forest Labs 2026). It is distilled to four steps without guidance; the base model is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from latentdiff.core.errors import ModelError
from latentdiff.diffusion.path import ByTokensAndSteps, Straight
from latentdiff.diffusion.path import Path as SamplingPath
from latentdiff.families import flow, layouts, stable_diffusion
from latentdiff.families.z_image import AFTER, BEFORE
from latentdiff.formats.folder import read_json
from latentdiff.model import EMPTY, Family, Layout, Model

PARTS = {
    "vae": frozenset({"AutoencoderKLFlux2"}),
    "transformer": frozenset({"Flux2Transformer2DModel"}),
    "text_encoder": frozenset({"Qwen3ForCausalLM"}),
    "tokenizer": frozenset({"Qwen2Tokenizer", "Qwen2TokenizerFast"}),
}
DEFAULTS = {"num_inference_steps": 50, "guidance_scale": 4.0}
DISTILLED = {"num_inference_steps": 4, "guidance_scale": 1.0}
_NO_THOUGHTS = "<think>\n\n</think>\n\n"  # what Qwen3's template adds where it is not to think
_GROWTH = ByTokensAndSteps((10, 8.73809524e-05, 1.89833333), (200, 0.00016927, 0.45666666), 4300)


def load(directory: Path, variant: str | None, states: Mapping[str, Any] = EMPTY) -> Model:
    """See Family and Layout."""
    import diffusers
    import transformers

    from latentdiff.families.weights import load_chat, pretrained
    from latentdiff.networks.backbones.flux_2 import Flux2
    from latentdiff.networks.encoders.reading import Chat

    backbone: Any = Flux2(
        pretrained(diffusers.Flux2Transformer2DModel, directory, "transformer", variant, Flux2, states)
    ).eval()
    chat = Chat(BEFORE, AFTER + _NO_THOUGHTS, layers=(9, 18, 27), reads_padding=True)
    texts: Any = load_chat(directory, transformers.Qwen3ForCausalLM, chat, variant, states)
    return flow.with_chat(backbone, texts, directory, family=FAMILY, variant=variant, states=states)


def path(scheduled: SamplingPath) -> SamplingPath:
    """See Family: the shift grows with the picture by a rule of its own, whatever the scheduler's config says."""
    if not isinstance(scheduled, Straight):
        raise ModelError("FLUX.2 requires a flow-matching scheduler")
    return replace(scheduled, growth=_GROWTH)


def defaults(directory: Path) -> Mapping[str, Any]:
    """See Family."""
    return DISTILLED if read_json(directory / "model_index.json").get("is_distilled") else DEFAULTS


def index(model: Model) -> dict[str, Any]:
    """See Family."""
    is_distilled = model.card.defaults.get("guidance_scale") == DISTILLED["guidance_scale"]
    return flow.index(model, "Flux2KleinPipeline", is_distilled=is_distilled)


def converted(state: dict[str, Any]) -> dict[str, Any]:
    """See Layout."""
    from diffusers.loaders import single_file_utils

    return dict(single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers(state))


FAMILY = Family(
    "FLUX.2 klein",
    frozenset({"Flux2KleinPipeline", "Flux2KleinInpaintPipeline"}),
    PARTS,
    frozenset(),
    load,
    stable_diffusion.save_transformer,
    index,
    defaults,
    Layout(layouts.flux_2, converted, load),
    path=path,
)
