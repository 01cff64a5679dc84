"""The diffusion transformer (Peebles & Xie 2023), which draws a picture of a class: a DiT and a KL autoencoder.

A model trained here may have no autoencoder, which makes it a pixel-space model.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from latentdiff.core.errors import ModelError
from latentdiff.families.card import model_card
from latentdiff.families.scheduler import read_scheduler
from latentdiff.families.stable_diffusion import save_transformer
from latentdiff.formats.folder import read_json
from latentdiff.model import Family, Model, ModelCard, TorchPlace

PIPELINE = "DiTPipeline"
DEFAULTS = {"guidance_scale": 4.0}
LONGEST_NAME = 1000  # characters


def load(directory: Path, variant: str | None) -> Model:
    """See Family."""
    import diffusers

    from latentdiff.families.weights import load_codec, pretrained
    from latentdiff.networks.backbones.dit import DiT

    path, prediction, *_ = read_scheduler(directory)
    backbone: Any = DiT(pretrained(diffusers.DiTTransformer2DModel, directory, "transformer", variant, DiT)).eval()
    names = names_of(read_json(directory / "model_index.json").get("id2label"), backbone.classes, directory)
    card = model_card(directory, path.T, variant, DEFAULTS)
    return assembled(backbone, names, load_codec(directory, variant), path, prediction, card, directory)


def assembled(
    backbone: Any, names: list[str], codec: Any, path: Any, prediction: str, card: ModelCard, where: Path
) -> Model:
    """A model from networks. Raises ModelError if they do not fit together."""
    from latentdiff.networks.encoders.class_labels import ClassLabels

    if backbone.spec.inputs != codec.latent_channels:
        raise ModelError(
            f"the transformer reads {backbone.spec.inputs} channels, latents have {codec.latent_channels} ({where})"
        )
    vae = getattr(codec, "vae", None)
    parts = {"transformer": backbone.model} | ({} if vae is None else {"vae": vae})
    encoder = ClassLabels(names)
    return Model(backbone, encoder, codec, path, prediction, card, TorchPlace("cpu"), FAMILY, parts)


def names_of(tree: Any, count: int, directory: Path) -> list[str]:
    """The names of `count` classes in an index; classes without names have numbers. Raises ModelError."""
    if tree is None:
        return [str(number) for number in range(count)]
    wanted = {str(number) for number in range(count)}
    if not isinstance(tree, dict) or tree.keys() != wanted:
        raise ModelError(f"id2label must name the {count} classes of the transformer ({directory}/model_index.json)")
    names = [tree[str(number)] for number in range(count)]
    if not all(isinstance(name, str) and name.strip() and len(name) <= LONGEST_NAME for name in names):
        raise ModelError(f"names in id2label must have 1 to {LONGEST_NAME} characters ({directory}/model_index.json)")
    return names


def index(model: Model) -> dict[str, Any]:
    """See Family."""
    encoder: Any = model.encoder
    return {
        "_class_name": PIPELINE,
        "_diffusers_version": version("diffusers"),
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"] if "vae" in model.parts else [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "id2label": {str(number): name for number, name in enumerate(encoder.names)},
    }


FAMILY = Family(
    "DiT",
    frozenset({PIPELINE}),
    {
        "transformer": frozenset({"DiTTransformer2DModel"}),
        "vae": frozenset({"AutoencoderKL", "AutoencoderTiny"}),
    },
    frozenset({"vae"}),
    load,
    save_transformer,
    index,
    lambda directory: DEFAULTS,
)
