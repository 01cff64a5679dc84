"""Jobs, which are single pictures of requests, and batches of jobs that are drawn together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from latentdiff.drawing.plan import Plan
from latentdiff.drawing.request import Request

if TYPE_CHECKING:
    import torch

    from latentdiff.drawing.canvas import Canvas
    from latentdiff.drawing.hints import Hint
    from latentdiff.drawing.image_prompts import ImagePrompt
    from latentdiff.networks.conditions import Conditions

OF_ONE_PICTURE = {"prompt", "negative_prompt", "seed", "num_images", "variation_seed"}  # may differ within a batch


@dataclass(frozen=True)
class Job:
    """The `index`-th picture of a request.

    canvas: the picture that it starts from. embeds: the caller's own conditions in place of the prompts'. hints: the
    pictures that the controls read. image_prompts: of each IP-Adapter.
    """

    request: Request
    index: int
    plan: Plan
    canvas: Canvas | None = None
    embeds: tuple[Conditions, Conditions | None] | None = None
    hints: tuple[Hint, ...] = ()
    image_prompts: tuple[ImagePrompt, ...] = ()

    @property
    def seed(self) -> int:
        """The picture's own seed."""
        return self.request.seed + self.index

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that all pictures of a batch share: all but the prompts, the seeds and their number."""
        return self.request.model_dump(exclude=OF_ONE_PICTURE)


@dataclass(frozen=True)
class CallerNoise:
    """The caller's own noise instead of keyed noise: the first noise (N, C, h, w), or torch's generators."""

    latents: torch.Tensor | None = None
    generators: Sequence[torch.Generator] | None = None

    def __bool__(self) -> bool:
        return self.latents is not None or self.generators is not None

    def of(self, first: int, count: int) -> CallerNoise:
        """The noise of some of the pictures; a single generator is shared by all."""
        latents = None if self.latents is None else self.latents[first : first + count]
        if self.generators is None:
            return CallerNoise(latents)
        alone = len(self.generators) == 1
        return CallerNoise(latents, [self.generators[0]] * count if alone else self.generators[first : first + count])


NO_NOISE = CallerNoise()


@dataclass(frozen=True)
class Batch:
    """Pictures that differ only in prompt, seed and input picture, and the caller's noise for them."""

    jobs: Sequence[Job]
    noise: CallerNoise = NO_NOISE

    def __len__(self) -> int:
        return len(self.jobs)

    @property
    def request(self) -> Request:
        """The first picture's request, whose settings all pictures share."""
        return self.jobs[0].request

    @property
    def plan(self) -> Plan:
        """The sizes and steps of all pictures."""
        return self.jobs[0].plan

    @property
    def canvases(self) -> list[Canvas]:
        """The input pictures of all jobs; empty if there are none."""
        return [job.canvas for job in self.jobs if job.canvas is not None]
