"""The contexts of a batch of pictures, with and without their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from latentdiff.core.arrays import Put
from latentdiff.core.errors import ConfigError
from latentdiff.drawing.job import Job
from latentdiff.drawing.request import Request
from latentdiff.networks.conditions import Context, stacked
from latentdiff.networks.encoders.prompt import Style

if TYPE_CHECKING:
    from latentdiff.networks.encoders.clip import TextEncoder
    from latentdiff.networks.encoders.two_clips import DualTextEncoder


Known = dict[tuple[str, Style, int], Context]  # by prompt, how it is read, and the least number of chunks


class Texts(NamedTuple):
    """Contexts of the prompts and of the negative prompts, (B, L, D) each; the latter only where guidance needs it."""

    cond: Context
    uncond: Context | None


def style_of(asked: Request) -> Style:
    """How the prompt is read."""
    return Style(asked.prompt_weights, asked.long_prompts, asked.clip_skip)


def chunks_of(job: Job, encoder: TextEncoder | DualTextEncoder) -> int:
    """In how many readings both of a picture's prompts go: their contexts are made as long as each other."""
    if job.own is not None:
        return len(job.own[0].tokens) // encoder.max_length
    style = style_of(job.request)
    prompts = [job.request.prompt] + [job.request.negative_prompt] * (job.request.guidance_scale > 1)
    return max(encoder.read(prompt, style).chunks for prompt in prompts)


def texts_of(
    jobs: Sequence[Job],
    encoder: TextEncoder | DualTextEncoder,
    size: tuple[int, int] | None,
    put: Put,
    known: Known | None = None,
) -> Texts:
    """The contexts of jobs that are of one size and one length.

    Equal prompts are encoded once and by themselves, so that none sees the batch's size. As in diffusers, clip_skip is
    of the prompt; the negative prompt is read to the usual layer. size: (height, width) for a network that reads it.
    known: what was encoded before, which grows.
    """
    asked = jobs[0].request
    style, least = style_of(asked), max(chunks_of(job, encoder) for job in jobs)
    known = {} if known is None else known

    def encoded(prompt: str, style: Style) -> Context:
        key = prompt, style, least
        if key not in known:
            known[key] = encoder.context(prompt, style, least=least)
        return known[key]

    own = [job.own or (encoded(job.request.prompt, style), None) for job in jobs]
    sizes = None if size is None else _sizes(asked, size, len(jobs))
    cond = replace(stacked([cond for cond, _ in own]), sizes=sizes).mapped(put)
    if asked.guidance_scale <= 1:
        return Texts(cond, None)
    plain = replace(style, clip_skip=None)
    negative = [
        uncond or encoded(job.request.negative_prompt, plain) for job, (_, uncond) in zip(jobs, own, strict=True)
    ]
    uncond = replace(stacked(negative), sizes=sizes).mapped(put)
    if uncond.tokens.shape != cond.tokens.shape:
        told = f"{tuple(cond.tokens.shape[1:])}, the empty prompt's {tuple(uncond.tokens.shape[1:])}"
        raise ConfigError(f"prompt_embeds are of {told}: give negative_prompt_embeds with them")
    return Texts(cond, uncond)


def _sizes(asked: Request, size: tuple[int, int], count: int) -> np.ndarray:
    """SDXL's (original size, crop, target size), the same for every picture of a batch, (B, 6)."""
    return np.array([[*(asked.original_size or size), *asked.crop, *size]] * count, np.float32)
