"""ControlNets, read from folders in diffusers' layout and from single files in the original one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from latentdiff.core.errors import ConfigError, ModelError, loading
from latentdiff.formats import folder
from latentdiff.model import Model
from latentdiff.networks.conditions import Conditions

CONTROLNETS = frozenset({"ControlNetModel", "ControlNetUnionModel"})
CLASSES = CONTROLNETS | {"T2IAdapter"}
PART = "controlnet"


def load_control(path: Path, model: Model) -> Any:
    """A control for a model, on the CPU in its stored precision. Raises ModelError, UnsafeError."""
    if path.is_file():
        return _of_file(path, model)
    control = stored_control(path)
    check_fit(control, model, path)
    return control


def stored_control(path: Path) -> Any:
    """A control of a folder, whatever model it is for. Raises ModelError, UnsafeError."""
    import diffusers

    from latentdiff.families.weights import pretrained

    place = check_control(path)
    name = folder.read_json(place / "config.json")["_class_name"]
    wrapper = _wrapper(name)
    return wrapper(pretrained(getattr(diffusers, name), place.parent, place.name, None, wrapper)).eval()


def check_control(path: Path) -> Path:
    """The folder of a control, checked; see `check_network`."""
    return folder.check_network(path, PART, CLASSES)


def control_of(module: Any, model: Model) -> Any:
    """A module of diffusers' as a control for a model. Raises ConfigError, ModelError."""
    if type(module).__name__ not in CLASSES:
        raise ConfigError(
            f"controlnet must be a path or a {' or a '.join(sorted(CLASSES))} (got {type(module).__name__})"
        )
    control = _wrapper(type(module).__name__)(module).eval()
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
    from latentdiff.networks.quiet import quietly
    from latentdiff.networks.with_weights import with_weights

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
        return ControlNet(with_weights(diffusers.ControlNetModel, config, weights)).eval()


def _wrapper(name: str) -> Any:
    """Our class for one of diffusers'."""
    from latentdiff.networks.controls.controlnet import ControlNet
    from latentdiff.networks.controls.t2i_adapter import T2IAdapter

    return ControlNet if name in CONTROLNETS else T2IAdapter


def _unet_of(model: Model, path: Path) -> Any:
    if (unet := model.parts.get("unet")) is None:
        raise ModelError(f"a ControlNet requires a U-Net, which this model does not have ({path})")
    return unet


def check_fit(control: Any, model: Model, path: Path) -> None:
    """Raises ModelError for a control whose residuals do not fit the model's U-Net."""
    unet = _unet_of(model, path).config
    own = control.model.config
    if control.once:
        _check_levels(control, unet, model, path)
        return
    if control.factor != model.codec.factor:
        raise ModelError(f"this control reads {control.factor} pixels a latent, not {model.codec.factor} ({path})")
    for key in ("block_out_channels", "layers_per_block", "cross_attention_dim", "addition_embed_type"):
        theirs, ours = (list(v) if isinstance(v, tuple) else v for v in (own.get(key), unet.get(key)))
        if theirs != ours:
            raise ModelError(f"a ControlNet for another model: its {key} is {theirs}, the U-Net's {ours} ({path})")
    if own.in_channels != model.codec.latent_channels:
        raise ModelError(f"this ControlNet reads latents of {own.in_channels} channels ({path})")


def _check_levels(control: Any, unet: Any, model: Model, path: Path) -> None:
    """Raises ModelError for features that are not those of the U-Net's levels, by computing some.

    A level without attention gets them after it has halved the sides. There may be one more, for the middle.
    """
    import torch

    levels, factor = list(unet.block_out_channels), model.codec.factor
    side = 2 ** (len(levels) + 1)
    hint = torch.zeros(1, 3, side * factor, side * factor)
    features = control.residuals(hint, 0.0, Conditions({}), hint, scale=1.0, guess=False, kind=0)
    theirs = [(feature.shape[1], side // feature.shape[2]) for feature in features]
    after = ["CrossAttn" not in kind for kind in unet.down_block_types[:-1]] + [False]
    ours = [(width, 2 ** (level + after[level])) for level, width in enumerate(levels)]
    if theirs[: len(ours)] != ours or len(theirs) > len(ours) + 1:
        raise ModelError(f"a T2I-Adapter for another model: it has levels {theirs}, the U-Net {ours} ({path})")
