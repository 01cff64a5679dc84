"""Cascades (Ho et al. 2022): a model draws small pictures, others enlarge them, each with the same prompt and seed.

An upscaler, a network that does not sample, may come last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from latentdiff.core.errors import ConfigError
from latentdiff.drawing.batch import Batch, Job
from latentdiff.drawing.canvas import canvas
from latentdiff.drawing.plan import Size, plan
from latentdiff.drawing.presets import settled_for
from latentdiff.drawing.request import Request, request
from latentdiff.model import Model

if TYPE_CHECKING:
    from latentdiff.drawing.painter import Painter

LARGEST = 8192  # pixels of a side of an enlarged picture


def check_jobs(jobs: Sequence[Job], painter: Painter) -> None:
    """Raises ConfigError for jobs that a cascade cannot enlarge, before anything is drawn."""
    final_of(jobs[0], painter)
    if painter.cascade and any(job.embeds is not None for job in jobs):
        raise ConfigError("prompt_embeds do not apply in a cascade: each of its models reads the prompt itself")


def enlarged(batch: Batch, pictures: np.ndarray, painter: Painter) -> Batch:
    """The batch in which a painter enlarges the pictures of another, uint8 (B, H, W, 3), by its own settings."""
    jobs = []
    for job, pixels in zip(batch.jobs, pictures, strict=True):
        small = replace(canvas(pixels, multiple=1), enlarged=_scale(painter.model))
        own = _request(job.request, painter.model)
        jobs.append(Job(own, job.index, plan(own, painter.model, small), small))
    return Batch(jobs)


def _request(base: Request, model: Model) -> Request:
    """The request of an enlarging pass: the prompt and the seed of the base, the settings that its model recommends."""
    shared = ("prompt", "negative_prompt", "seed", "num_images", "batch_size", "prompt_weights", "long_prompts")
    fields = {name: getattr(base, name) for name in (*shared, "vae_tiling", "vae_slicing")}
    return request(**settled_for(model, fields))


def _scale(model: Model) -> int:
    assert model.enlarging is not None
    return model.enlarging.scale


def steps_of(job: Job, cascade: Sequence[Painter]) -> int:
    """The number of steps of a picture in all passes."""
    return sum(job.plan.steps) + sum(_request(job.request, each.model).num_inference_steps for each in cascade)


def final_of(job: Job, painter: Painter) -> Size:
    """The size of a finished picture. Raises ConfigError for one that is too large."""
    size = job.plan.final if job.canvas is None else job.canvas.final
    scales = [_scale(each.model) for each in painter.cascade]
    scales += [] if painter.upscaler is None or job.request.hires_scale else [painter.upscaler.scale]
    height, width = (math.prod(scales) * side for side in size)
    if scales and max(height, width) > LARGEST:
        raise ConfigError(f"the enlarged picture has {width}x{height} pixels; a side is at most {LARGEST}")
    return height, width
