"""A painter: a model ready to draw, with everything loaded beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from latentdiff.core.errors import ConfigError
from latentdiff.drawing.prompts import Memory
from latentdiff.drawing.record import Source
from latentdiff.drawing.request import Request
from latentdiff.model import Model
from latentdiff.networks.protocols import DeepFeatures, PerturbedAttention

if TYPE_CHECKING:
    from latentdiff.networks.scorer import Scorer


@dataclass(frozen=True)
class Painter:
    """See the module. sources: by name, in the order of loading; memory: conditions of earlier prompts."""

    model: Model
    weaker: Model | None = None
    scorer: Scorer | None = None
    sources: Mapping[str, Source] = field(default_factory=dict)
    memory: Memory | None = None

    def with_source(self, name: str, source: Source) -> Painter:
        """A painter with one more source."""
        return replace(self, sources={**self.sources, name: source})


def torch_only(request: Request, model: Model) -> str | None:
    """The part of a request that requires torch; None if a compiled model can draw it."""
    if model.runtime == "torch":
        return None
    if request.pag_scale and not isinstance(model.backbone, PerturbedAttention):
        return "perturbed attention"
    if request.clip_guidance_scale:
        return "guidance by CLIP"
    if request.autoguidance_scale != 1:
        return "a weaker model"
    return "vae_tiling" if request.vae_tiling else None


def check(request: Request, painter: Painter) -> None:
    """Refuse settings that have no effect on this model, or lack what they require. Raises ConfigError."""
    model = painter.model
    backbone = model.backbone
    if (request.original_size or request.crop != (0, 0)) and not model.reads_sizes:
        raise ConfigError("original_size and crop require SDXL; this model reads no sizes")
    if request.pag_scale and not (isinstance(backbone, PerturbedAttention) and backbone.perturbed_blocks):
        raise ConfigError("pag_scale requires self-attention in the middle block, which this model does not have")
    if request.autoguidance_scale != 1 and painter.weaker is None:
        raise ConfigError("autoguidance_scale requires a weaker model (load_weaker, --weaker)")
    if request.clip_guidance_scale and painter.scorer is None:
        raise ConfigError("clip_guidance_scale requires a CLIP (load_clip, --clip)")
    if request.cache_interval > 1 and not (isinstance(backbone, DeepFeatures) and backbone.deep_levels):
        raise ConfigError("cache_interval requires a U-Net of several levels; this model has one")
