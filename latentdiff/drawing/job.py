"""One picture that is to be drawn: its request, which of the request's it is, and what of it was given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from latentdiff.drawing.request import Request

if TYPE_CHECKING:
    import torch

    from latentdiff.drawing.canvas import Canvas
    from latentdiff.networks.conditions import Context


@dataclass(frozen=True)
class Job:
    """One picture of a request. canvas: the picture that it starts from; own: contexts instead of prompts."""

    request: Request
    index: int
    canvas: Canvas | None = None
    own: tuple[Context, Context | None] | None = None

    @property
    def seed(self) -> int:
        """The picture's own seed."""
        return self.request.seed + self.index

    @property
    def settings(self) -> dict[str, Any]:
        """What pictures of one batch must have in common: all but the prompts, the seeds and their number."""
        own = {"prompt", "negative_prompt", "seed", "num_images", "variation_seed"}
        return self.request.model_dump(exclude=own)


@dataclass(frozen=True)
class Own:
    """What the caller draws with instead of the keyed noise: the first noise (N, C, h, w), or generators."""

    latents: torch.Tensor | None = None
    generators: Sequence[torch.Generator] | None = None

    def __bool__(self) -> bool:
        return self.latents is not None or self.generators is not None

    def of(self, first: int, count: int) -> Own:
        """Of some of the pictures; a single generator is everyone's."""
        latents = None if self.latents is None else self.latents[first : first + count]
        if self.generators is None:
            return Own(latents)
        alone = len(self.generators) == 1
        return Own(latents, [self.generators[0]] * count if alone else self.generators[first : first + count])


NOTHING = Own()


def jobs_of(asked: Request, canvas: Canvas | None = None) -> list[Job]:
    """A request's pictures, one by one."""
    return [Job(asked, index, canvas) for index in range(asked.num_images)]
