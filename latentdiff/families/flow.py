"""What the families of flow-matching transformers share: their assembly, and the check that their networks fit."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from latentdiff.core.errors import ModelError
from latentdiff.families.card import model_card
from latentdiff.families.sampling import FLOW
from latentdiff.families.scheduler import read_scheduler
from latentdiff.model import EMPTY, Family, Model, TorchPlace

SCHEDULER = ["diffusers", FLOW]


def assembled(
    backbone: Any,
    texts: Any,
    codec: Any,
    directory: Path,
    *,
    family: Family,
    widths: Mapping[str, int],
    parts: Mapping[str, Any],
    variant: str | None = None,
    states: Mapping[str, Any] = EMPTY,
) -> Model:
    """The model of a folder, and of parts from other files (`states`).

    widths: of the text encoders' outputs, by condition; parts: the text encoders' modules and tokenizers.

    Raises ModelError if the networks do not fit together.
    """
    reads, inputs = backbone.spec.reads, backbone.spec.inputs
    for name, width in widths.items():
        if reads[name][-1] != width:
            raise ModelError(f"the transformer reads {name} of {reads[name][-1]}, the texts have {width} ({directory})")
    if inputs not in (codec.latent_channels, 2 * codec.latent_channels):
        raise ModelError(f"the transformer reads {inputs} channels, latents have {codec.latent_channels} ({directory})")
    scheduled, prediction, *_ = read_scheduler(directory)
    path = family.path(scheduled)
    card = model_card(directory, path.T, variant, family.defaults(directory), hashed=not states)
    modules = {"vae": codec.vae, "transformer": backbone.model, **parts}
    return Model(backbone, texts, codec, path, prediction, card, TorchPlace("cpu"), family, modules)


def with_chat(
    backbone: Any,
    texts: Any,
    directory: Path,
    *,
    family: Family,
    variant: str | None,
    states: Mapping[str, Any],
) -> Model:
    """The model of a folder whose only text encoder is a language model; see `assembled`."""
    from latentdiff.families.weights import load_vae

    return assembled(
        backbone,
        texts,
        load_vae(directory / "vae", variant, states),
        directory,
        family=family,
        widths={"tokens": texts.width},
        parts={"text_encoder": texts.model, "tokenizer": texts.tokenizer},
        variant=variant,
        states=states,
    )


def index(model: Model, pipeline: str, **further: Any) -> dict[str, Any]:
    """model_index.json: diffusers' names of the parts and their classes."""
    libraries = {"vae": "diffusers", "transformer": "diffusers"}
    classes = {name: [libraries.get(name, "transformers"), type(part).__name__] for name, part in model.parts.items()}
    return {
        "_class_name": pipeline,
        "_diffusers_version": version("diffusers"),
        **classes,
        "scheduler": SCHEDULER,
        **further,
    }
