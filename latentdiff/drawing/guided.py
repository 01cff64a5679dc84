"""The denoiser of a batch: the backbone under its conditions, guided as the request says."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from latentdiff.core.arrays import Array, library
from latentdiff.diffusion import guidance
from latentdiff.diffusion.parametrization import Denoiser, Network, denoiser
from latentdiff.drawing.prompts import Prompted
from latentdiff.drawing.request import Request
from latentdiff.drawing.start import Start
from latentdiff.networks.conditions import Conditions, together
from latentdiff.networks.protocols import Backbone, DeepFeatures, PerturbedAttention, PreparesConditions

TRUSTED = 0.05  # how far CLIP's gradient moves unit-variance latents in a step; unbounded, it fools CLIP


@dataclass(frozen=True)
class Helpers:
    """The optional helpers of guidance: a weaker denoiser, and the gradient of a score of x0."""

    weaker: Denoiser | None = None
    gradient: Callable[[Array], Array] | None = None


def network_of(backbone: Backbone, extra: Array | None = None) -> Network:
    """The backbone as a Network; for inpainting it also reads the channels `extra` beside x."""

    def network(x: Array, time: float, conditions: Conditions) -> Array:
        return backbone.predict(_with(x, extra), time, conditions)

    return network


def perturbed(backbone: PerturbedAttention, extra: Array | None) -> Network:
    """The backbone with perturbed attention, as a Network."""

    def network(x: Array, time: float, conditions: Conditions) -> Array:
        return backbone.predict_perturbed(_with(x, extra), time, conditions)

    return network


def reusing(backbone: DeepFeatures, extra: Array | None, every: int) -> Network:
    """The backbone as a Network that computes its deep features only in one of `every` evaluations and reuses them.

    It serves one walk through the levels. Evaluations with other numbers of conditions are counted separately.
    """
    last: dict[int, tuple[int, Array]] = {}

    def network(x: Array, time: float, conditions: Conditions) -> Array:
        evaluations, deep = last.get(conditions.count, (0, None))
        kept = deep if evaluations % every else None
        output, deep = backbone.predict_from(_with(x, extra), time, conditions, kept)
        last[conditions.count] = evaluations + 1, deep
        return output

    return network


def _with(x: Array, extra: Array | None) -> Array:
    return x if extra is None else library(x).concatenate([x, extra], 1)


def prepared(backbone: Backbone, conditions: Conditions) -> Conditions:
    """The conditions with what the backbone computes from them once a picture."""
    return backbone.prepared(conditions) if isinstance(backbone, PreparesConditions) else conditions


def guided(
    backbone: Backbone, prediction: str, prompts: Prompted, request: Request, start: Start, helpers: Helpers
) -> Denoiser:
    """The guided denoiser: guidance between conditions, then away from weaker models, then the unmasked input."""
    network = _network(backbone, start.beside, request.cache_interval)
    plain = denoiser(network, prediction, prepared(backbone, prompts.cond))
    cond = denoise = guidance.once(plain)
    if prompts.uncond is not None:
        both = prepared(backbone, together([prompts.uncond, prompts.cond]))
        pair = guidance.once(denoiser(network, prediction, both))
        cond, denoise = guidance.chosen(pair, 1), _by_prompt(pair, backbone, prediction, prompts, request, start)
    if request.pag_scale:
        assert isinstance(backbone, PerturbedAttention)
        other = denoiser(perturbed(backbone, start.beside), prediction, prepared(backbone, prompts.cond))
        denoise = guidance.away_from(denoise, cond, other, request.pag_scale)
    if helpers.weaker is not None:
        denoise = guidance.away_from(denoise, cond, helpers.weaker, request.autoguidance_scale - 1)
    if request.guidance_rescale:
        denoise = guidance.rescaled(denoise, cond, request.guidance_rescale, prediction)
    if request.guidance_renorm:
        denoise = guidance.renormed(denoise, cond, backbone.spec.multiple, prediction)
    if request.threshold is not None:
        denoise = guidance.thresholded(denoise, cond, request.threshold)
    if helpers.gradient is not None:
        denoise = guidance.toward(denoise, helpers.gradient, request.clip_guidance_scale, radius=TRUSTED)
    if request.guidance_interval:
        denoise = guidance.within(denoise, plain, *request.guidance_interval)
    if start.mask is not None and start.extra is None:
        denoise = guidance.keep(denoise, start.known, start.mask, start.walk or start.levels)
    return denoise


def _network(backbone: Backbone, extra: Array | None, every: int) -> Network:
    if every == 1:
        return network_of(backbone, extra)
    assert isinstance(backbone, DeepFeatures)
    return reusing(backbone, extra, every)


def _by_prompt(
    pair: Denoiser, backbone: Backbone, prediction: str, prompts: Prompted, request: Request, start: Start
) -> Denoiser:
    """Guidance by the prompt, and of a network that edits pictures by the picture too."""
    reads_guidance = "guidance" in backbone.spec.reads
    if start.context is not None and not reads_guidance:
        assert prompts.uncond is not None
        nothing = _network(backbone, 0 * start.context, request.cache_interval)
        free = denoiser(nothing, prediction, prepared(backbone, prompts.uncond))
        return guidance.of_text_and_image(pair, free, request.guidance_scale, request.image_guidance_scale)
    scale = request.cfg(reads_guidance)
    if not request.apg:
        return guidance.classifier_free(pair, scale)
    norm = math.inf if request.apg_norm is None else request.apg_norm
    return guidance.apg(pair, scale, eta=request.apg_eta, norm=norm, momentum=request.apg_momentum)
