"""A painter: a model ready to draw, with everything loaded beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from latentdiff.core.errors import ConfigError
from latentdiff.diffusion.parametrization import PARAMETRIZATIONS
from latentdiff.diffusion.path import Straight
from latentdiff.drawing.prompts import Memory, noise_level
from latentdiff.drawing.record import Source
from latentdiff.drawing.request import EACH_CONTROL, IMAGE_GUIDANCE, Request
from latentdiff.model import Model
from latentdiff.networks.protocols import DeepFeatures, PerturbedAttention

if TYPE_CHECKING:
    from latentdiff.networks.scorer import Scorer
    from latentdiff.networks.upscaler import Upscaler


@dataclass(frozen=True)
class Painter:
    """See the module. sources: by name, in the order of loading; memory: conditions of earlier prompts."""

    model: Model
    weaker: Model | None = None
    refiner: Model | None = None
    scorer: Scorer | None = None
    controls: tuple[Any, ...] = ()  # see networks.controls.controlled.GivesResiduals
    ip_adapters: tuple[Any, ...] = ()  # see networks.controls.ip_adapter
    upscaler: Upscaler | None = None
    cascade: tuple[Painter, ...] = ()  # which enlarge the picture one after the other
    sources: Mapping[str, Source] = field(default_factory=dict)
    memory: Memory | None = None

    @property
    def learnt_more(self) -> bool:
        """Whether an adapter or a learnt word is loaded, which may know other words than the model."""
        return any(source.kind in ("lora", "merged", "embedding") for source in self.sources.values())

    def with_source(self, name: str, source: Source) -> Painter:
        """A painter with one more source."""
        return replace(self, sources={**self.sources, name: source})


def torch_only(request: Request, model: Model, image_prompts: int = 0) -> str | None:
    """The part of a request that requires torch; None if a compiled model can draw it.

    image_prompts: the number of IP-Adapters.
    """
    if model.runtime == "torch":
        return None
    if image_prompts and request.cache_interval > 1:
        return "cache_interval with an IP-Adapter"
    if request.pag_scale and not isinstance(model.backbone, PerturbedAttention):
        return "perturbed attention"
    if request.clip_guidance_scale:
        return "guidance by CLIP"
    if request.autoguidance_scale != 1:
        return "a weaker model"
    if model.backbone.spec.side is not None and _other_size(request, model):
        return "another size"
    return "vae_tiling" if request.vae_tiling else None


def _other_size(request: Request, model: Model) -> bool:
    """Whether a request asks for a size of its own."""
    sides = zip((request.height, request.width), model.card.size, strict=True)
    return request.hires_scale is not None or any(side not in (None, usual) for side, usual in sides)


def prediction_of(request: Request, model: Model) -> str:
    """What the network predicts: by the request, otherwise by the model's files. Raises ConfigError."""
    prediction = request.prediction or model.prediction
    if prediction not in PARAMETRIZATIONS:
        known = ", ".join(PARAMETRIZATIONS)
        raise ConfigError(f"the model's files say that it predicts {prediction!r}. Set prediction to one of {known}")
    if prediction == "v_prediction" and isinstance(model.path, Straight):
        raise ConfigError("prediction: v_prediction requires a variance-preserving path; this model's is straight")
    return prediction


def check(request: Request, painter: Painter) -> None:
    """Refuse settings that have no effect on this model, or lack what they require. Raises ConfigError."""
    model = painter.model
    backbone = model.backbone
    prediction_of(request, model)
    _check_read(request, model)
    if request.autoguidance_scale != 1 and painter.weaker is None:
        raise ConfigError("autoguidance_scale requires a weaker model (load_weaker, --weaker)")
    if painter.refiner is None and request.refiner_switch is not None:
        raise ConfigError("refiner_switch requires a refiner (load_refiner, --refiner)")
    if painter.refiner is not None and (request.pag_scale or request.autoguidance_scale != 1):
        raise ConfigError("a refiner supports neither pag_scale nor autoguidance_scale")
    _check_enlarging(request, model)
    _check_controls(request, painter)
    if request.clip_guidance_scale and painter.scorer is None:
        raise ConfigError("clip_guidance_scale requires a CLIP (load_clip, --clip)")
    if request.cache_interval > 1 and not (isinstance(backbone, DeepFeatures) and backbone.deep_levels):
        raise ConfigError("cache_interval requires a U-Net of several levels, which this model does not have")


def _check_read(request: Request, model: Model) -> None:
    """Raises ConfigError for settings that this backbone does not support."""
    backbone = model.backbone
    if (request.original_size or request.crop != (0, 0)) and not model.reads_sizes:
        raise ConfigError("original_size and crop require a model that reads sizes; this one reads none")
    if request.true_cfg_scale != 1 and not model.reads_guidance:
        raise ConfigError("true_cfg_scale requires a model that reads its guidance. Use guidance_scale")
    if request.image_guidance_scale != IMAGE_GUIDANCE and not model.must_edit:
        raise ConfigError("image_guidance_scale requires a model that edits pictures, like InstructPix2Pix")
    if request.apg and request.cfg(model.reads_guidance) <= 1:
        raise ConfigError(f"apg requires {'true_cfg_scale' if model.reads_guidance else 'guidance_scale'} over 1")
    if request.apg and model.must_edit:
        raise ConfigError("apg does not apply to a model that is guided by a picture too")
    if request.pag_scale and not (isinstance(backbone, PerturbedAttention) and backbone.perturbed_blocks):
        raise ConfigError("pag_scale requires self-attention in the middle block, which this model does not have")


def _check_enlarging(request: Request, model: Model) -> None:
    """Raises ConfigError for settings that do not apply because the model enlarges pictures, or does not."""
    enlarging = model.enlarging
    if enlarging is None:
        if request.noise_level is not None:
            raise ConfigError("noise_level requires a model that enlarges pictures")
        return
    if (level := noise_level(enlarging, request)) >= enlarging.times:
        raise ConfigError(f"noise_level must be below {enlarging.times} for this model (got {level})")
    for name, is_set in {
        "strength": request.strength is not None,
        "hires_scale": request.hires_scale is not None,
        "padding_mask_crop": request.padding_mask_crop is not None,
    }.items():
        if is_set:
            raise ConfigError(f"{name} does not apply to a model that enlarges pictures")


def _check_controls(request: Request, painter: Painter) -> None:
    """Raises ConfigError for settings of controls that are not loaded, or that do not know the kind of picture."""
    _check_image_prompts(request, len(painter.ip_adapters))
    count, controls = len(painter.controls), painter.controls
    for name in EACH_CONTROL:
        if (length := len(getattr(request, name))) not in (0, 1, count) or (length and not count):
            loaded = (
                f"{count} ControlNets are loaded" if count else "no ControlNet is loaded (load_controlnet, --control)"
            )
            raise ConfigError(f"{name} has {length} values, and {loaded}")
    if not controls:
        if request.guess_mode:
            raise ConfigError("guess_mode requires a ControlNet (load_controlnet, --control)")
        return
    if request.cache_interval > 1:
        raise ConfigError("cache_interval does not apply under a control, which changes the features at every step")
    modes = request.control_mode * (count if len(request.control_mode) == 1 else 1) or (None,) * count
    for control, mode in zip(controls, modes, strict=True):
        if control.kinds and mode is None:
            raise ConfigError(
                f"this ControlNet knows {control.kinds} kinds of pictures: set control_mode, 0 to {control.kinds - 1}"
            )
        if mode is not None and not mode < max(control.kinds, 1):
            raise ConfigError(f"control_mode must be below {max(control.kinds, 1)} for this ControlNet (got {mode})")


def _check_image_prompts(request: Request, count: int) -> None:
    length = len(request.ip_adapter_scale)
    if length and (not count or length not in (1, count)):
        loaded = f"{count} IP-Adapters are loaded" if count else "no IP-Adapter is loaded"
        raise ConfigError(f"ip_adapter_scale has {length} values, and {loaded} (load_ip_adapter, --ip-adapter)")
