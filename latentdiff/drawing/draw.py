"""The one road from a request to pictures, for every caller: request -> jobs -> batches -> passes -> pictures."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np

from latentdiff.core.arrays import Array, as_tensor, library, to_numpy
from latentdiff.core.errors import ConfigError, NonFiniteError
from latentdiff.core.images import as_picture, coloured, to_uint8, to_values
from latentdiff.diffusion.samplers import Step
from latentdiff.drawing import pixels
from latentdiff.drawing.batch import NO_NOISE, Batch, CallerNoise, Job
from latentdiff.drawing.canvas import Canvas, Margins, canvas
from latentdiff.drawing.cascade import check_jobs, enlarged, final_of
from latentdiff.drawing.hints import Hint
from latentdiff.drawing.image_prompts import ImagePrompt
from latentdiff.drawing.latents import final_to_diffusers
from latentdiff.drawing.output import Output, joined
from latentdiff.drawing.painter import Painter, check
from latentdiff.drawing.passes import steps
from latentdiff.drawing.plan import plan
from latentdiff.drawing.presets import settled_for
from latentdiff.drawing.prompts import chunks_of, notes_of
from latentdiff.drawing.record import ImageMetadata, installed_versions
from latentdiff.drawing.request import Request, check_size, request
from latentdiff.model import Model

Watch = Callable[[Step], Array | None]
OUTPUT_TYPES = ("pil", "np", "pt", "latent", "uint8")


def requested(painter: Painter, prompt: str, **settings: Any) -> Request:
    """A validated request, completed with the model's recommended settings. Raises ConfigError."""
    made = request(prompt=prompt, **settled_for(painter.model, settings))
    check(made, painter)
    return made


def canvas_of(
    model: Model,
    request: Request,
    image: Any,
    mask: Any = None,
    *,
    margins: Margins = Margins(),  # noqa: B008 - frozen
    names: tuple[str | None, str | None] = (None, None),
) -> Canvas | None:
    """The picture that a request starts from, or None; see `drawing.canvas`. Raises ConfigError."""
    if image is None:
        _check_without_image(request, mask is not None or any(margins))
        return None
    if request.hires_scale:
        raise ConfigError("hires_scale has no effect with an image; width and height enlarge it")
    for name, side in (("height", request.height), ("width", request.width)):
        if side is not None:
            check_size(name, side, model.multiple)
    if request.mask_blur and mask is None and not any(margins):
        raise ConfigError("mask_blur requires a mask or outpainting")
    if model.enlarging is not None:
        return _small(model.enlarging.scale, request, image, mask is not None or any(margins), names)
    sides = (request.height, request.width)
    size, closeup = sides, None
    if request.padding_mask_crop is not None:  # then the size is the part's, by default the model's
        own = model.card.size
        size, closeup = (None, None), (request.padding_mask_crop, (sides[0] or own[0], sides[1] or own[1]))
    more: dict[str, Any] = {"margins": margins, "names": names, "blur": request.mask_blur, "closeup": closeup}
    return canvas(image, mask, size=size, multiple=model.multiple, **more)


def _small(scale: int, request: Request, image: Any, is_masked: bool, names: tuple[str | None, str | None]) -> Canvas:
    """The picture that is enlarged; width and height are those of the result. Raises ConfigError."""
    if is_masked:
        raise ConfigError("a model that enlarges pictures supports no mask and no outpainting")
    for name, side in (("height", request.height), ("width", request.width)):
        if side is not None:
            check_size(name, side, scale)
    height, width = (None if side is None else side // scale for side in (request.height, request.width))
    return replace(canvas(image, size=(height, width), multiple=1, names=names), enlarged=scale)


def _check_without_image(request: Request, is_masked: bool) -> None:
    """Raises ConfigError for settings that require an image."""
    if is_masked:
        raise ConfigError("a mask and outpainting require an image")
    settings = {
        "strength": request.strength is not None,
        "mask_blur": request.mask_blur > 0,
        "padding_mask_crop": request.padding_mask_crop is not None,
    }
    for name in (name for name, is_set in settings.items() if is_set):
        raise ConfigError(f"{name} requires an image")


def jobs_of(
    model: Model,
    request: Request,
    base: Canvas | None = None,
    embeds: Any = None,
    hints: tuple[Hint, ...] = (),
    image_prompts: tuple[ImagePrompt, ...] = (),
) -> list[Job]:
    """A request's pictures, one by one. Raises ConfigError for sizes that the model cannot draw."""
    planned = plan(request, model, base)
    return [Job(request, index, planned, base, embeds, hints, image_prompts) for index in range(request.num_images)]


def batch_key(painter: Painter, job: Job) -> tuple[Any, ...]:
    """What jobs must have in common to be drawn in one batch."""
    canvas = job.canvas
    form = canvas and (canvas.pixels.shape, canvas.size, canvas.final, canvas.mask is None)
    forms = [each.form for each in job.image_prompts]
    return job.settings, form, chunks_of(job, painter.model), job.embeds is None, forms


def batches_of(painter: Painter, jobs: Sequence[Job], noise: CallerNoise = NO_NOISE) -> Iterator[Batch]:
    """Jobs in batches, in their order; a batch's pictures differ only in prompt, seed and input picture."""
    first = 0
    for _, group in groupby(jobs, partial(batch_key, painter)):
        same = list(group)
        size = same[0].request.batch_size
        for start in range(0, len(same), size):
            some = same[start : start + size]
            yield Batch(some, noise.of(first, len(some)))
            first += len(some)


class Drawing:
    """A batch being drawn: iterate over its steps, then `finish`. notes: what the user should know of it.

    In a cascade the last painter's latents are the final ones.
    """

    def __init__(self, painter: Painter, batch: Batch):
        self._painter, self.batch = painter, batch
        self._current, self._current_batch = painter, batch
        self.notes = notes_of(batch, painter.model, adapted=painter.learnt_more)
        check_jobs(batch.jobs, painter)

    def __iter__(self) -> Generator[Step, Array | None, None]:
        """Every step of every pass; other latents may be sent, from which drawing goes on."""
        latents = yield from self._walk()
        for painter in self._painter.cascade:
            small = coloured(to_uint8(self._images(latents)))
            self._current, self._current_batch = painter, enlarged(self._current_batch, small, painter)
            latents = yield from self._walk()

    def _walk(self) -> Generator[Step, Array | None, Array]:
        """Every step of the current painter; returns the last latents."""
        request = self._current_batch.request
        codec = self._current.model.codec
        walk = steps(self._current_batch, self._current, self.notes)
        sent: Array | None = None
        final: Array = None
        while True:
            # entered for each step: a block that stays open in a generator would be open for its caller too
            with codec.piecewise(tiles=request.vae_tiling, slices=request.vae_slicing):
                try:
                    step = walk.send(sent)
                except StopIteration:
                    return final
            sent = yield step
            final = step.x if sent is None else sent

    def _images(self, latents: Array) -> Array:
        """The images of final latents, (B, C, H, W), with what their inputs keep. Raises NonFiniteError."""
        model, jobs, request = self._current.model, self._current_batch.jobs, self._current_batch.request
        with model.codec.piecewise(tiles=request.vae_tiling, slices=request.vae_slicing):
            images = pixels.decode(model, latents, self.notes)
        self._check_finite(latents, images)
        return _kept(model, images, [job.canvas for job in jobs])

    def _upscaled(self, images: Array) -> Array:
        """Images enlarged by the upscaler, unless it has enlarged the input of a second pass."""
        upscaler = self._painter.upscaler
        if upscaler is None or self.batch.request.hires_scale:
            return images
        return self._current.model.array(to_values(upscaler.enlarge(coloured(to_uint8(images)))))

    def _check_finite(self, latents: Array, images: Array) -> None:
        if not (pixels.all_finite(latents) and pixels.all_finite(images)):
            what = "sampling" if not pixels.all_finite(latents) else "decoding"
            seeds = [job.seed for job in self.batch.jobs]
            raise NonFiniteError(f"{what} gave non-finite numbers (seeds {seeds}). Try float32 or less guidance")

    def finish(self, latents: Array, output_type: str = "pil") -> Output:
        """Decode final latents and record how each picture was made. Raises NonFiniteError."""
        model, jobs = self._current.model, self.batch.jobs
        seeds = [job.seed for job in jobs]
        images: Any = latents
        if output_type == "latent":
            self._check_finite(latents, latents)
        else:
            images = self._upscaled(self._images(latents))
            self.notes += _notes_on_flat(model, images, seeds)
        own = bool(self.batch.noise)
        records = [record_of(self._painter, job, own, (place, len(jobs))) for place, job in enumerate(jobs)]
        return Output(_as_type(model, images, output_type), seeds, records, self.notes)

    def output(self, output_type: str = "pil", watch: Watch | None = None) -> Output:
        """All steps, then `finish`. watch: sees each step, and may return other latents to go on from."""
        walk = iter(self)
        step = next(walk)
        while True:
            sent = None if watch is None else watch(step)
            final = step.x if sent is None else sent
            try:
                step = walk.send(sent)
            except StopIteration:
                return self.finish(final, output_type)


def _notes_on_flat(model: Model, images: Array, seeds: Sequence[int]) -> list[str]:
    """A note on pictures of one colour, which weights that are too coarse draw; an empty list without any."""
    cause = f". Perhaps {model.quantized} is too coarse for this model" if model.quantized else ""
    flat = [str(seed) for seed, is_flat in zip(seeds, pixels.are_flat(images), strict=True) if is_flat]
    return [f"one colour fills the whole picture (seeds {', '.join(flat)}){cause}"] if flat else []


def _kept(model: Model, images: Array, canvases: Sequence[Canvas | None]) -> Array:
    """Images (B, C, H, W) with the inputs' pixels outside the masks, without padding."""
    if all(each is None for each in canvases):
        return images
    rows = [i if each is None else each.kept(i, model.array) for i, each in zip(images, canvases, strict=True)]
    return library(images).stack(rows)


def _as_type(model: Model, images: Array, output_type: str) -> Any:
    if output_type == "latent":
        return as_tensor(final_to_diffusers(model, images))
    if output_type == "pt":
        return (as_tensor(images) + 1) / 2
    pictures = to_uint8(images)
    if output_type == "uint8":
        return pictures
    if output_type == "np":
        return np.ascontiguousarray(to_numpy((images + 1) / 2).transpose(0, 2, 3, 1))
    return [as_picture(picture) for picture in pictures]


def draw(
    painter: Painter,
    jobs: Sequence[Job],
    output_type: str = "pil",
    noise: CallerNoise = NO_NOISE,
    watch: Watch | None = None,
) -> Output:
    """All pictures of jobs, batch by batch. watch: see `Drawing.output`."""
    return joined([Drawing(painter, batch).output(output_type, watch) for batch in batches_of(painter, jobs, noise)])


def draw_prompts(
    painter: Painter,
    prompts: Sequence[str],
    *,
    seed: int,
    hints: Sequence[tuple[Hint, ...]] = (),
    image_prompts: Sequence[tuple[ImagePrompt, ...]] = (),
    images: Sequence[np.ndarray] = (),
    **settings: Any,
) -> np.ndarray:
    """A picture of each prompt with seeds that count up from `seed`, uint8 (N, H, W, C).

    hints, image_prompts: of each prompt, for the controls and the IP-Adapters. images: each starts from one, uint8
    (H, W, 3).
    """
    jobs: list[Job] = []
    nothing: list[tuple[Any, ...]] = [()] * len(prompts)
    alone: list[Any] = [None] * len(prompts)
    each = zip(prompts, images or alone, hints or nothing, image_prompts or nothing, strict=True)
    for prompt, image, own, beside in each:
        made = requested(painter, prompt, seed=seed + len(jobs), **settings)
        jobs += jobs_of(painter.model, made, canvas_of(painter.model, made, image), hints=own, image_prompts=beside)
    pictures: np.ndarray = draw(painter, jobs, "uint8").images
    return pictures


def record_of(painter: Painter, job: Job, own_noise: bool = False, place: tuple[int, int] = (0, 1)) -> ImageMetadata:
    """The record of a picture. place: its index in its batch, and the batch's size."""
    model, card = painter.model, painter.model.card
    height, width = final_of(job, painter)
    return ImageMetadata(
        request=job.request.model_dump(),
        index=job.index,
        seed=job.seed,
        width=width,
        height=height,
        steps=job.plan.steps,
        model=card.name,
        model_hash=card.hash,
        model_source=card.source,
        variant=card.variant,
        sources=tuple(painter.sources.values()),
        canvas=None if job.canvas is None else job.canvas.record(),
        hints=tuple(hint.record() for hint in job.hints),
        image_prompts=tuple(each.record() for each in job.image_prompts),
        runtime=model.runtime,
        device=getattr(model.place.device, "type", "cpu"),
        dtype=model.dtype,
        speed=model.speed,
        quantized=model.quantized,
        versions=installed_versions(model.runtime),
        batch=place,
        own_noise=own_noise or job.embeds is not None or any(not each.pictures for each in job.image_prompts),
    )
