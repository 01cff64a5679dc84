"""The passes of a batch: each starts from noise, from an input picture, or from the previous pass.

TextToImage    from noise
ImageToImage   from input pictures, of which all or a masked part is drawn over
Enlarge        from noise, beside small input pictures
Hires          from the previous pass' picture, enlarged by Lanczos or by an upscaler

With a refiner, another model walks the last levels of the last pass.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np

from latentdiff.core.arrays import Array, library
from latentdiff.core.images import coloured, to_uint8
from latentdiff.diffusion.level import CLEAN, NoiseLevel
from latentdiff.diffusion.parametrization import Denoiser, denoiser
from latentdiff.diffusion.process import diffuse
from latentdiff.diffusion.samplers import SAMPLERS, Step
from latentdiff.drawing import pixels
from latentdiff.drawing.batch import Batch
from latentdiff.drawing.canvas import HALF, Canvas, resized
from latentdiff.drawing.guided import Helpers, guided, network_of, prepared
from latentdiff.drawing.hints import controls_of
from latentdiff.drawing.image_prompts import with_image_prompts
from latentdiff.drawing.painter import Painter, prediction_of
from latentdiff.drawing.plan import PlannedPass, Size, shortened
from latentdiff.drawing.prompts import Prompted, noise_level, prompted
from latentdiff.drawing.request import REFINER_SWITCH, Request
from latentdiff.drawing.start import Draw, Start, from_latents, generated, keyed, latent_mask
from latentdiff.model import Model
from latentdiff.networks.averaging import averaging
from latentdiff.networks.controls.controlled import controlled
from latentdiff.networks.protocols import Backbone

if TYPE_CHECKING:
    from latentdiff.networks.upscaler import Upscaler

AVERAGED = ("ddim", "euler")  # samplers that take one evaluation for a step, along its velocity


class Pass(Protocol):
    """One walk through the levels. purpose: the key of the noise that its sampler adds."""

    @property
    def planned(self) -> PlannedPass:
        """The size and the steps of the pass."""
        ...

    @property
    def purpose(self) -> str:
        """The key of the noise that the pass' sampler adds."""
        ...

    def levels(self) -> tuple[NoiseLevel, ...]:
        """The levels that it walks."""
        ...

    def start(self, before: Array | None, draw: Draw) -> Start:
        """The start of the walk; before: the final latents of the previous pass."""
        ...


def passes_of(batch: Batch, painter: Painter, notes: list[str]) -> list[Pass]:
    """The passes of a batch, from its plan."""
    first, *later = batch.plan.passes
    kind = TextToImage if not batch.canvases else ImageToImage if painter.model.enlarging is None else Enlarge
    made: list[Pass] = [kind(batch, painter.model, first, notes)]
    return made + [Hires(batch, painter.model, planned, notes, upscaler=painter.upscaler) for planned in later]


def steps(batch: Batch, painter: Painter, notes: list[str]) -> Generator[Step, Array | None, None]:
    """Sample a batch, yielding each step of each pass; other latents may be sent, from which sampling goes on."""
    before: Array | None = None
    passes = passes_of(batch, painter, notes)
    for each in passes:
        draw = _draw(batch, painter.model, painter.model.codec.shape(each.planned.size))
        start = each.start(before, draw)
        walk = partial(_walked, batch, size=each.planned.size, draw=draw)
        if painter.refiner is None or each is not passes[-1]:
            before = yield from walk(painter, start, each.purpose)
            continue
        split = _switch(start.levels, batch.request, painter.model)
        if split:
            first = replace(start, levels=start.levels[: split + 1], walk=start.levels)
            start = replace(start, x=(yield from walk(painter, first, each.purpose)))
        if split < len(start.levels) - 1:
            refining = replace(painter, model=painter.refiner, refiner=None, memory=None, controls=(), ip_adapters=())
            rest = replace(start, levels=start.levels[split:], walk=start.levels, extra=None, context=None)
            yield from walk(refining, rest, "refiner noise")


def _switch(levels: Sequence[NoiseLevel], request: Request, model: Model) -> int:
    """The number of steps before the refiner's: those that start at time (1 - switch) T or above, as in diffusers."""
    switch = REFINER_SWITCH if request.refiner_switch is None else request.refiner_switch
    lowest = round(model.path.T * (1 - switch))
    return sum(level.t >= lowest for level in levels[:-1])


def _walked(
    batch: Batch, painter: Painter, start: Start, purpose: str, *, size: Size, draw: Draw
) -> Generator[Step, Array | None, Array]:
    """Walk through the levels of a start, yielding each step; returns the last latents."""
    model, request = painter.model, batch.request
    prompts = prompted(batch, model, size, painter.memory)
    image_prompts = [job.image_prompts for job in batch.jobs]
    if painter.ip_adapters:
        prompts = Prompted(*with_image_prompts(*prompts, painter.ip_adapters, image_prompts, request, model.array))
    prediction, helpers = prediction_of(request, model), _helpers(batch, painter, size, start)
    hints = [job.hints if painter.controls else () for job in batch.jobs]  # a refiner has no controls
    controls = controls_of(painter.controls, hints, request, start.levels, size, model.array)
    backbone = controlled(controls)(_averaging(model, request, start))
    denoise = guided(backbone, prediction, prompts, request, start, helpers)
    sampler = SAMPLERS[request.sampler].with_options(eta=request.eta, churn=request.churn)
    walk = sampler(denoise, start.x, start.levels, partial(draw, purpose), model.path)
    step: Step = next(walk)
    while True:
        sent = yield step
        try:
            step = walk.send(sent)
        except StopIteration:
            return step.x if sent is None else sent


def _averaging(model: Model, request: Request, start: Start) -> Backbone:
    """The backbone; a mean flow's averages over each step, for samplers that go straight to the next level."""
    times = [max(level.t, 0.0) for level in start.levels]
    straight = request.sampler in AVERAGED
    return averaging(model.backbone, times if straight else [], model.array)


def _draw(batch: Batch, model: Model, shape: tuple[int, ...]) -> Draw:
    if batch.noise.generators is not None:
        return generated(batch.noise.generators, shape, model.array)
    return keyed(batch.jobs, shape, model.array)


@dataclass(frozen=True)
class _Planned:
    batch: Batch
    model: Model
    planned: PlannedPass
    notes: list[str]

    def levels(self) -> tuple[NoiseLevel, ...]:
        """The levels of this pass: the end of the request's grid."""
        request = self.batch.request
        tokens = self.model.codec.shape(self.planned.size)
        count = int(np.prod(tokens[1:])) // self.model.backbone.spec.multiple**2 if len(tokens) == 3 else 0
        path = self.model.path
        if request.timesteps:
            levels = (*map(path.level, request.timesteps), CLEAN)
        elif request.sigmas:
            levels = (*map(path.level_of_sigma, request.sigmas), CLEAN)
        else:
            levels = path.levels(request.num_inference_steps, request.spacing, count)
        return shortened(levels, self.planned.steps)

    def noise(self, draw: Draw) -> Array:
        """The first noise: the caller's, or the keyed draw."""
        own = self.batch.noise.latents
        return draw("initial latents") if own is None else own


@dataclass(frozen=True)
class TextToImage(_Planned):
    """See the module."""

    purpose: str = "sampling noise"

    def start(self, before: Array | None, draw: Draw) -> Start:
        """See Pass."""
        return with_extra(self.model, Start(self.noise(draw), self.levels()), notes=self.notes)


@dataclass(frozen=True)
class ImageToImage(_Planned):
    """See the module."""

    purpose: str = "sampling noise"

    def start(self, before: Array | None, draw: Draw) -> Start:
        """See Pass."""
        model, canvases = self.model, self.batch.canvases
        known = _each(canvases, lambda canvas: pixels.encode(model, canvas.pixels[None], self.notes))
        masked = [canvas for canvas in canvases if canvas.mask is not None]
        mask = _each(masked, lambda canvas: _latent_mask(model, canvas)) if masked else None
        fresh = self.planned.strength == 1
        start = from_latents(self.levels(), self.noise(draw), known, mask, fresh=fresh)
        if (model.inpaints or model.edits) and fresh:  # as diffusers starts: the network reads the picture beside x
            start = replace(start, x=self.noise(draw))
        start = replace(start, context=_context(model, known)) if model.edits else start
        return with_extra(model, start, masked, notes=self.notes)


@dataclass(frozen=True)
class Enlarge(_Planned):
    """See the module. The small pictures get noise, as in the network's training."""

    purpose: str = "enlarging noise"

    def start(self, before: Array | None, draw: Draw) -> Start:
        """See Pass."""
        model, enlarging = self.model, self.model.enlarging
        assert enlarging is not None
        _, height, width = model.codec.shape(self.planned.size)
        seen = np.stack([resized(canvas.pixels, height, width) for canvas in self.batch.canvases])
        small = pixels.as_images(model, seen)
        level = enlarging.path.level(noise_level(enlarging, self.batch.request))
        noise = _draw(self.batch, model, tuple(small.shape[1:]))("noise of the small picture")
        own = self.batch.noise.latents  # another key: in a cascade the small picture was drawn from "initial latents"
        x = draw("enlarged latents") if own is None else own
        return Start(x, self.levels(), extra=diffuse(small, noise, level))


@dataclass(frozen=True)
class Hires(_Planned):
    """See the module."""

    purpose: str = "hires noise"
    upscaler: Upscaler | None = None

    def start(self, before: Array | None, draw: Draw) -> Start:
        """See Pass."""
        pictures = coloured(to_uint8(pixels.decode(self.model, before, self.notes)))
        if self.upscaler is not None:
            pictures = self.upscaler.enlarge(pictures)
        enlarged = np.stack([resized(picture, *self.planned.size) for picture in pictures])
        known = pixels.encode(self.model, enlarged, self.notes)
        start = from_latents(self.levels(), draw("hires latents"), known)
        return with_extra(self.model, start, notes=self.notes)


def _context(model: Model, known: Array) -> Array:
    """What an editing backbone reads of a picture's latents."""
    return known if model.family is None or model.family.context is None else model.family.context(model, known)


def _latent_mask(model: Model, canvas: Canvas) -> Array:
    return model.array(latent_mask(np.asarray(canvas.mask), model.codec.factor))


def _each(canvases: Sequence[Canvas], compute: Callable[[Canvas], Array]) -> Array:
    """Values for each canvas, computed one by one, so that they do not depend on the rest of the batch."""
    known = {id(canvas): compute(canvas) for canvas in canvases}
    rows = [known[id(canvas)] for canvas in canvases]
    return library(rows[0]).concatenate(rows)


def with_extra(model: Model, start: Start, canvases: Sequence[Canvas] = (), *, notes: list[str] | None = None) -> Start:
    """A start for an inpainting backbone, with a mask (by default of everything) and the masked latents.

    The network knows hard masks only: it draws where the mask is at least half, as diffusers has it.
    """
    if not model.inpaints:
        return start
    if canvases:
        hidden = _each(canvases, lambda canvas: _hidden(model, canvas, notes))
        assert start.mask is not None
        ones = library(start.mask).ones_like(start.mask)
        mask = library(ones).where(start.mask >= 0.5, ones, 0 * ones)
    else:
        height, width = (side * model.codec.factor for side in start.x.shape[-2:])
        blank = np.zeros((1, model.codec.image_channels, height, width), np.float32)
        grey = pixels.encode_images(model, model.array(blank), notes)
        hidden = library(grey).concatenate([grey] * len(start.x))
        mask = library(start.x).ones_like(start.x[:, :1])
    return replace(start, extra=library(hidden).concatenate([mask, hidden], 1))


def _hidden(model: Model, canvas: Canvas, notes: list[str] | None) -> Array:
    """The latents of a picture whose masked part is grey."""
    assert canvas.mask is not None
    visible = pixels.as_images(model, canvas.pixels[None]) * model.array(canvas.mask < HALF)
    return pixels.encode_images(model, visible, notes)


def _helpers(batch: Batch, painter: Painter, size: Size, start: Start) -> Helpers:
    request = batch.request
    weaker = _weaker(batch, painter, size, start) if request.autoguidance_scale != 1 else None
    if not request.clip_guidance_scale:
        return Helpers(weaker)
    assert painter.scorer is not None
    prompts = [job.request.prompt for job in batch.jobs]
    return Helpers(weaker, painter.scorer.gradient(prompts, partial(pixels.differentiable_decode, painter.model)))


def _weaker(batch: Batch, painter: Painter, size: Size, start: Start) -> Denoiser:
    """The weaker model's denoiser under the same prompts, which its own encoder reads."""
    weaker = painter.weaker
    assert weaker is not None
    cond = prompted(batch, weaker, size).cond
    is_alike = (weaker.inpaints, weaker.edits) == (painter.model.inpaints, painter.model.edits)
    return denoiser(
        network_of(weaker.backbone, start.beside if is_alike else None),
        weaker.prediction,
        prepared(weaker.backbone, cond),
    )
