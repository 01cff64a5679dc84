"""ControlNets, read from folders in diffusers' layout and from single files in the original one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentdiff.core.errors import ModelError
from latentdiff.formats import folder
from latentdiff.model import Model

CLASSES = frozenset({"ControlNetModel", "ControlNetUnionModel"})
PART = "controlnet"


def load_control(path: Path, model: Model, variant: str | None = None) -> Any:
    """A ControlNet for a model, on the CPU in its stored precision. Raises ModelError, UnsafeError."""
    import diffusers

    from latentdiff.families.weights import pretrained
    from latentdiff.networks.controls.controlnet import ControlNet

    place = folder.check_network(path, PART, CLASSES)
    name = folder.read_json(place / "config.json")["_class_name"]
    control = ControlNet(pretrained(getattr(diffusers, name), place.parent, place.name, variant, ControlNet)).eval()
    check_fit(control, model, path)
    return control


def check_fit(control: Any, model: Model, path: Path) -> None:
    """Raises ModelError for a ControlNet whose residuals do not fit the model's U-Net."""
    unet = getattr(model.parts.get("unet"), "config", None)
    if unet is None:
        raise ModelError(f"a ControlNet requires a U-Net, which this model does not have ({path})")
    own = control.model.config
    for key in ("block_out_channels", "layers_per_block", "cross_attention_dim", "addition_embed_type"):
        theirs, ours = (list(v) if isinstance(v, tuple) else v for v in (own.get(key), unet.get(key)))
        if theirs != ours:
            raise ModelError(f"a ControlNet for another model: its {key} is {theirs}, the U-Net's {ours} ({path})")
    if control.factor != model.codec.factor:
        raise ModelError(f"this ControlNet reads {control.factor} pixels a latent, not {model.codec.factor} ({path})")
    if own.in_channels != model.codec.latent_channels:
        raise ModelError(f"this ControlNet reads latents of {own.in_channels} channels ({path})")
