"""Z-Image and Z-Image-Turbo: a single-stream transformer on a straight path, Flux.1's autoencoder of 16 channels, and
Qwen3 as the text encoder (Alibaba 2025). Turbo is distilled to eight steps without guidance.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentdiff.families import flow, layouts, stable_diffusion
from latentdiff.model import EMPTY, Family, Layout, Model

PARTS = {
    "vae": frozenset({"AutoencoderKL"}),
    "transformer": frozenset({"ZImageTransformer2DModel"}),
    "text_encoder": frozenset({"Qwen3Model", "Qwen3ForCausalLM"}),
    "tokenizer": frozenset({"Qwen2Tokenizer", "Qwen2TokenizerFast"}),
}
DEFAULTS = {"num_inference_steps": 8, "guidance_scale": 1.0}
BEFORE, AFTER = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"  # Qwen3's template


def load(directory: Path, variant: str | None, states: Mapping[str, Any] = EMPTY) -> Model:
    """See Family and Layout."""
    import diffusers
    import transformers

    from latentdiff.families.weights import load_chat, pretrained
    from latentdiff.formats.folder import read_json
    from latentdiff.networks.backbones.z_image import ZImage
    from latentdiff.networks.encoders.reading import Chat

    network = diffusers.ZImageTransformer2DModel
    backbone: Any = ZImage(pretrained(network, directory, "transformer", variant, ZImage, states)).eval()
    name = read_json(directory / "model_index.json")["text_encoder"][1]
    chat = Chat(BEFORE, AFTER, layers=(-2,))
    texts: Any = load_chat(directory, getattr(transformers, name), chat, variant, states)
    return flow.with_chat(backbone, texts, directory, family=FAMILY, variant=variant, states=states)


def index(model: Model) -> dict[str, Any]:
    """See Family."""
    return flow.index(model, "ZImagePipeline")


def converted(state: dict[str, Any]) -> dict[str, Any]:
    """See Layout. Some files have diffusers' names already."""
    if any(name.startswith("all_x_embedder.") for name in state):
        return state
    from diffusers.loaders import single_file_utils

    return dict(single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers(state))


FAMILY = Family(
    "Z-Image",
    frozenset(f"ZImage{task}" for task in stable_diffusion.TASKS),
    PARTS,
    frozenset(),
    load,
    stable_diffusion.save_transformer,
    index,
    lambda directory: DEFAULTS,
    Layout(layouts.z_image, converted, load),
)
