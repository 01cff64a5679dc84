"""Qwen-Image: a multimodal transformer on a straight path, an autoencoder of 16 channels made for videos, and
Qwen2.5-VL as the text encoder (Wu et al. 2025).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentdiff.families import flow, layouts, stable_diffusion
from latentdiff.model import EMPTY, Family, Layout, Model

PARTS = {
    "vae": frozenset({"AutoencoderKLQwenImage"}),
    "transformer": frozenset({"QwenImageTransformer2DModel"}),
    "text_encoder": frozenset({"Qwen2_5_VLForConditionalGeneration"}),
    "tokenizer": frozenset({"Qwen2Tokenizer", "Qwen2TokenizerFast"}),
}
DEFAULTS = {"num_inference_steps": 50, "guidance_scale": 4.0, "guidance_renorm": True}
_BEFORE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)  # part of the model: it was trained with these words
_AFTER = "<|im_end|>\n<|im_start|>assistant\n"
_DROPPED = 34  # tokens of _BEFORE


def load(directory: Path, variant: str | None, states: Mapping[str, Any] = EMPTY) -> Model:
    """See Family and Layout."""
    import diffusers
    import transformers

    from latentdiff.families.weights import load_chat, pretrained
    from latentdiff.networks.backbones.qwen_image import QwenImage
    from latentdiff.networks.encoders.reading import Chat

    network = diffusers.QwenImageTransformer2DModel
    backbone: Any = QwenImage(pretrained(network, directory, "transformer", variant, QwenImage, states)).eval()
    chat = Chat(_BEFORE, _AFTER, length=1024, dropped=_DROPPED)
    texts: Any = load_chat(directory, transformers.Qwen2_5_VLForConditionalGeneration, chat, variant, states)
    return flow.with_chat(backbone, texts, directory, family=FAMILY, variant=variant, states=states)


def index(model: Model) -> dict[str, Any]:
    """See Family."""
    return flow.index(model, "QwenImagePipeline")


FAMILY = Family(
    "Qwen-Image",
    frozenset(f"QwenImage{task}" for task in stable_diffusion.TASKS),
    PARTS,
    frozenset(),
    load,
    stable_diffusion.save_transformer,
    index,
    lambda directory: DEFAULTS,
    Layout(layouts.qwen_image, dict, load),
)
