"""The denoiser of a batch: the network under its texts, guided as the request asks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from latentdiff.core.arrays import Array, library
from latentdiff.diffusion import guidance
from latentdiff.diffusion.parametrization import Denoiser, Network, denoiser
from latentdiff.drawing.request import Request
from latentdiff.drawing.start import Start
from latentdiff.drawing.texts import Texts
from latentdiff.networks.conditions import Context, stacked

if TYPE_CHECKING:
    from latentdiff.networks.backbones.unet import UNet


TRUSTED = 0.05  # how far CLIP's gradient moves unit-variance latents in a step; unbounded, it draws for CLIP alone


@dataclass(frozen=True)
class Helpers:
    """What guidance may need beside the network: a weaker denoiser, and the gradient of a score of x0."""

    weaker: Denoiser | None = None
    gradient: Callable[[Array], Array] | None = None


def network_of(unet: UNet, extra: Array | None = None, *, perturbed: bool = False) -> Network:
    """The U-Net as sampling sees it, which for inpainting reads `extra` channels beside x."""
    run = unet.predict_perturbed if perturbed else unet.predict

    def network(x: Array, t: float, context: Context) -> Array:
        return run(x if extra is None else library(x).concatenate([x, extra], 1), t, context)

    return network


def reusing(unet: UNet, extra: Array | None, every: int) -> Network:
    """The U-Net with its deep features computed in one of so many evaluations, and used again in the others.

    For one walk through the levels. Evaluations under other numbers of conditions are counted apart.
    """
    last: dict[int, tuple[int, Array]] = {}

    def network(x: Array, t: float, context: Context) -> Array:
        conditions = len(context.tokens) if context.tokens.ndim == 4 else 0
        count, deep = last.get(conditions, (0, None))
        whole = x if extra is None else library(x).concatenate([x, extra], 1)
        output, deep = unet.predict_from(whole, t, context, deep if count % every else None)
        last[conditions] = count + 1, deep
        return output

    return network


def guided(unet: UNet, prediction: str, texts: Texts, asked: Request, start: Start, helpers: Helpers) -> Denoiser:
    """Guidance by what the conditions differ in, then by what lies elsewhere, then what is kept of a given picture."""
    every = asked.cache_interval
    network = network_of(unet, start.extra) if every == 1 else reusing(unet, start.extra, every)
    plain = denoiser(network, prediction, unet.prepared(texts.cond))
    cond = drawn = guidance.once(plain)
    if texts.uncond is not None:
        both = unet.prepared(stacked([texts.uncond, texts.cond]))
        pair = guidance.once(denoiser(network, prediction, both))
        cond, drawn = guidance.chosen(pair, 1), _classifier_free(pair, asked)
    if asked.pag_scale:
        other = denoiser(network_of(unet, start.extra, perturbed=True), prediction, unet.prepared(texts.cond))
        drawn = guidance.away_from(drawn, cond, other, asked.pag_scale)
    if helpers.weaker is not None:
        drawn = guidance.away_from(drawn, cond, helpers.weaker, asked.autoguidance_scale - 1)
    if asked.guidance_rescale:
        drawn = guidance.rescaled(drawn, cond, asked.guidance_rescale)
    if asked.threshold is not None:
        drawn = guidance.thresholded(drawn, cond, asked.threshold)
    if helpers.gradient is not None:
        drawn = guidance.toward(drawn, helpers.gradient, asked.clip_guidance_scale, radius=TRUSTED)
    if asked.guidance_interval:
        drawn = guidance.within(drawn, plain, *asked.guidance_interval)
    if start.mask is not None and start.extra is None:
        drawn = guidance.keep(drawn, start.known, start.mask)
    return drawn


def _classifier_free(pair: Denoiser, asked: Request) -> Denoiser:
    if not asked.apg:
        return guidance.classifier_free(pair, asked.guidance_scale)
    norm = math.inf if asked.apg_norm is None else asked.apg_norm
    return guidance.apg(pair, asked.guidance_scale, eta=asked.apg_eta, norm=norm, momentum=asked.apg_momentum)
