"""ControlNets, read from folders in diffusers' layout and from single files in the original one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from latentdiff.core.errors import ConfigError, ModelError, loading
from latentdiff.formats import folder
from latentdiff.model import Model

CLASSES = frozenset({"ControlNetModel", "ControlNetUnionModel"})
PART = "controlnet"


def load_control(path: Path, model: Model, variant: str | None = None) -> Any:
    """A ControlNet for a model, on the CPU in its stored precision. Raises ModelError, UnsafeError."""
    import diffusers

    from latentdiff.families.weights import pretrained
    from latentdiff.networks.controls.controlnet import ControlNet

    if path.is_file():
        return _of_file(path, model)
    place = folder.check_network(path, PART, CLASSES)
    name = folder.read_json(place / "config.json")["_class_name"]
    control = ControlNet(pretrained(getattr(diffusers, name), place.parent, place.name, variant, ControlNet)).eval()
    check_fit(control, model, path)
    return control


def control_of(module: Any, model: Model) -> Any:
    """A module of diffusers' as a ControlNet for a model. Raises ConfigError, ModelError."""
    from latentdiff.networks.controls.controlnet import ControlNet

    if type(module).__name__ not in CLASSES:
        raise ConfigError(
            f"controlnet must be a path, a {' or a '.join(sorted(CLASSES))} (got {type(module).__name__})"
        )
    control = ControlNet(module).eval()
    check_fit(control, model, Path("a module"))
    return control


def _of_file(path: Path, model: Model) -> Any:
    """A ControlNet of a single file, under the original names or diffusers'; its config is the U-Net's."""
    import diffusers
    from diffusers.loaders import single_file_utils
    from safetensors.torch import load_file

    from latentdiff.formats.pickle import check_safetensors
    from latentdiff.formats.tensors import unscaled
    from latentdiff.networks.controls.controlnet import ControlNet, config_for
    from latentdiff.networks.filled import filled
    from latentdiff.networks.quiet import quietly

    unet = _unet_of(model, path)
    check_safetensors(path, ". Give a .safetensors file")
    with loading(path), quietly():
        state = unscaled(load_file(path))
        if not any("input_hint_block." in name or "controlnet_cond_embedding." in name for name in state):
            raise ModelError(f"there is no ControlNet in it ({path})")
        config = config_for(unet, model.codec.factor)
        weights = single_file_utils.convert_controlnet_checkpoint(state, config)
        weights |= {  # of SDXL's, which the library leaves out
            f"add_embedding.linear_{1 + int(match[1]) // 2}.{match[2]}": tensor
            for name, tensor in state.items()
            if (match := re.fullmatch(r"(?:control_model\.)?label_emb\.0\.([02])\.(weight|bias)", name))
        }
        return ControlNet(filled(diffusers.ControlNetModel, config, weights)).eval()


def _unet_of(model: Model, path: Path) -> Any:
    if (unet := model.parts.get("unet")) is None:
        raise ModelError(f"a ControlNet requires a U-Net, which this model does not have ({path})")
    return unet


def check_fit(control: Any, model: Model, path: Path) -> None:
    """Raises ModelError for a ControlNet whose residuals do not fit the model's U-Net."""
    unet = _unet_of(model, path).config
    own = control.model.config
    for key in ("block_out_channels", "layers_per_block", "cross_attention_dim", "addition_embed_type"):
        theirs, ours = (list(v) if isinstance(v, tuple) else v for v in (own.get(key), unet.get(key)))
        if theirs != ours:
            raise ModelError(f"a ControlNet for another model: its {key} is {theirs}, the U-Net's {ours} ({path})")
    if control.factor != model.codec.factor:
        raise ModelError(f"this ControlNet reads {control.factor} pixels a latent, not {model.codec.factor} ({path})")
    if own.in_channels != model.codec.latent_channels:
        raise ModelError(f"this ControlNet reads latents of {own.in_channels} channels ({path})")
