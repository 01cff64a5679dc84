"""The passes of a batch: the steps from noise or from a picture; with hires-fix, those from the first's enlarged."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from latentdiff.core.arrays import Array, library
from latentdiff.core.images import coloured, to_uint8
from latentdiff.diffusion.level import NoiseLevel
from latentdiff.diffusion.parametrization import Denoiser, denoiser
from latentdiff.diffusion.samplers import SAMPLERS, Step
from latentdiff.drawing.canvas import Canvas, resized
from latentdiff.drawing.guided import Helpers, guided, network_of
from latentdiff.drawing.job import NOTHING, Job, Own
from latentdiff.drawing.plan import Size, enlarged, hires_strength_of, shortened, step_counts, strength_of
from latentdiff.drawing.request import Request
from latentdiff.drawing.start import Draw, Start, from_latents, generated, keyed, latent_mask
from latentdiff.drawing.texts import texts_of

if TYPE_CHECKING:
    from latentdiff.pipeline import LatentDiffusionPipeline


def passes(pipe: LatentDiffusionPipeline, jobs: Sequence[Job], own: Own = NOTHING) -> Iterator[Step]:
    """Sample jobs of one batch together, yielding each step of each pass."""
    asked, canvas = jobs[0].request, jobs[0].canvas
    step_counts(asked, canvas)  # refuses a strength of no steps before anything is computed
    size = pipe.size(asked, canvas)
    draw = _draw(pipe, jobs, size, own)
    last = yield from _sampled(pipe, jobs, size, _first(pipe, jobs, draw, own), draw, "sampling noise")
    if asked.hires_scale is None:
        return
    size = enlarged(size, asked, pipe.multiple)
    pictures = [resized(picture, *size) for picture in coloured(to_uint8(pipe.decode(last.x)))]
    draw = _draw(pipe, jobs, size, own)
    levels = shortened(_levels(pipe, asked), hires_strength_of(asked))
    start = _with_extra(pipe, from_latents(levels, draw("hires latents"), pipe.encode(np.stack(pictures))))
    yield from _sampled(pipe, jobs, size, start, draw, "hires noise")


def _levels(pipe: LatentDiffusionPipeline, asked: Request) -> tuple[NoiseLevel, ...]:
    return pipe.path.levels(asked.num_inference_steps, asked.spacing)


def _draw(pipe: LatentDiffusionPipeline, jobs: Sequence[Job], size: Size, own: Own) -> Draw:
    shape = pipe.latent_shape(size)
    if own.generators is not None:
        return generated(own.generators, shape, pipe.array)
    return keyed(jobs, shape, pipe.array)


def _first(pipe: LatentDiffusionPipeline, jobs: Sequence[Job], draw: Draw, own: Own) -> Start:
    """The start of the first pass: noise, or a given picture of which all or a part is drawn over."""
    asked, levels = jobs[0].request, _levels(pipe, jobs[0].request)
    drawn = draw("initial latents") if own.latents is None else own.latents
    canvases = [job.canvas for job in jobs if job.canvas is not None]
    if not canvases:
        return _with_extra(pipe, Start(drawn, levels))
    strength = strength_of(asked, canvases[0].mask is not None)
    known = _each(canvases, lambda canvas: pipe.encode(canvas.pixels[None]))
    masks = [canvas for canvas in canvases if canvas.mask is not None]
    mask = _each(masks, lambda canvas: _latent_mask(pipe, canvas)) if masks else None
    start = from_latents(shortened(levels, strength), drawn, known, mask, fresh=strength == 1)
    return _with_extra(pipe, start, masks)


def _latent_mask(pipe: LatentDiffusionPipeline, canvas: Canvas) -> Array:
    return pipe.array(latent_mask(np.asarray(canvas.mask), pipe.autoencoder.factor))


def _each(canvases: Sequence[Canvas], compute: Callable[[Canvas], Array]) -> Array:
    """Computed by itself once for each canvas, whatever else is in the batch."""
    known = {id(canvas): compute(canvas) for canvas in canvases}
    rows = [known[id(canvas)] for canvas in canvases]
    return library(rows[0]).concatenate(rows)


def _with_extra(pipe: LatentDiffusionPipeline, start: Start, canvases: Sequence[Canvas] = ()) -> Start:
    """For an inpainting network: beside x a mask and the latents of what it hides; without a mask all is hidden."""
    if pipe.unet.in_channels == pipe.autoencoder.latent_channels:
        return start
    if canvases:
        hidden = _each(canvases, lambda canvas: _hidden(pipe, canvas))
        mask = start.mask
    else:
        height, width = (side * pipe.autoencoder.factor for side in start.x.shape[-2:])
        grey = pipe.encode_images(pipe.array(np.zeros((1, pipe.image_channels, height, width), np.float32)))
        hidden = library(grey).concatenate([grey] * len(start.x))
        mask = library(start.x).ones_like(start.x[:, :1])
    assert mask is not None
    return replace(start, extra=library(hidden).concatenate([mask, hidden], 1))


def _hidden(pipe: LatentDiffusionPipeline, canvas: Canvas) -> Array:
    """The latents of a picture that is grey where it is to be drawn."""
    assert canvas.mask is not None
    return pipe.encode_images(pipe.as_images(canvas.pixels[None]) * pipe.array(~canvas.mask))


def _sampled(
    pipe: LatentDiffusionPipeline, jobs: Sequence[Job], size: Size, start: Start, draw: Draw, purpose: str
) -> Generator[Step, None, Step]:
    """One pass; returns its last step."""
    asked = jobs[0].request
    texts = texts_of(jobs, pipe.text_encoder, size if pipe.unet.reads_sizes else None, pipe.array, pipe.texts())
    denoise = guided(pipe.unet, pipe.prediction, texts, asked, start, _helpers(pipe, jobs, size, start))
    for step in _sampler(asked)(denoise, start.x, start.levels, partial(draw, purpose), pipe.path):
        yield step
    return step


def _helpers(pipe: LatentDiffusionPipeline, jobs: Sequence[Job], size: Size, start: Start) -> Helpers:
    asked = jobs[0].request
    weaker = _weaker(pipe, jobs, size, start) if asked.autoguidance_scale != 1 else None
    if not asked.clip_guidance_scale:
        return Helpers(weaker)
    assert pipe.extras.scorer is not None
    prompts = [job.request.prompt for job in jobs]
    return Helpers(weaker, pipe.extras.scorer.gradient(prompts, pipe.differentiable_decode))


def _weaker(pipe: LatentDiffusionPipeline, jobs: Sequence[Job], size: Size, start: Start) -> Denoiser:
    """The weaker model under the same prompts, read by its own text encoder."""
    weaker = pipe.extras.weaker
    assert weaker is not None
    texts = texts_of(jobs, weaker.text_encoder, size if weaker.unet.reads_sizes else None, pipe.array)
    extra = start.extra if weaker.unet.in_channels == pipe.unet.in_channels else None
    return denoiser(network_of(weaker.unet, extra), weaker.prediction, weaker.unet.prepared(texts.cond))


def _sampler(asked: Request) -> Any:
    """The sampler by name, with eta where it is asked for."""
    return SAMPLERS[asked.sampler].with_options(eta=asked.eta, churn=asked.churn)
