"""The same picture by several samplers at several numbers of steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from latentdiff.core.errors import ConfigError
from latentdiff.show.sheet import Sheet, strip

if TYPE_CHECKING:
    from latentdiff.pipeline import LatentDiffusionPipeline

TEXT = (
    "One prompt, one seed: a row is a sampler, a column a number of steps. Samplers of the same equation agree where "
    "they have enough steps; those that add noise (ancestral, SDE) end at other pictures of the same distribution."
)
SAMPLERS = ("ddim", "euler", "dpmpp_2m", "unipc", "heun", "euler_ancestral")
STEPS = (3, 5, 10, 20, 40)
MOST = 100  # pictures


def samplers(
    pipe: LatentDiffusionPipeline,
    prompt: str,
    *,
    names: Sequence[str] = SAMPLERS,
    steps: Sequence[int] = STEPS,
    seed: int = 0,
    **settings: Any,
) -> Sheet:
    """A picture of the prompt for every sampler and number of steps. Raises ConfigError."""
    if not 1 <= len(names) * len(steps) <= MOST:
        raise ConfigError(
            f"{len(names)} samplers at {len(steps)} numbers of steps: they must make 1 to {MOST} pictures"
        )
    rows: list[list[np.ndarray | None]] = []
    for name in names:
        options = {**settings, "seed": seed, "sampler": name, "output_type": "uint8"}
        rows.append([pipe(prompt, num_inference_steps=count, **options).images[0] for count in steps])
    return Sheet(f"{pipe.card.name}: samplers on “{prompt}”", TEXT, strip(rows, names, [f"{n} steps" for n in steps]))
