"""Strips of pictures over time: the forward process, which adds noise, and the reverse one, which removes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from latentdiff.core.arrays import library
from latentdiff.core.errors import ConfigError
from latentdiff.core.images import to_uint8, to_values
from latentdiff.diffusion.noise import normal
from latentdiff.show.sheet import Sheet, strip

if TYPE_CHECKING:
    from latentdiff.pipeline import LatentDiffusionPipeline

FORWARD = (
    "x_t = alpha x0 + sigma noise at rising times. First row: the noise is added to the picture's own values. Second "
    "row: it is added to the latents, which are then decoded. SNR is (alpha / sigma)^2."
)
REVERSE = (
    "First row: the latents x_t after each step, decoded. Second row: the network's guess of the clean latents at that "
    "step, x0, decoded. The guess is blurred at first, since it is the mean of all pictures that are still possible."
)
MOST = 16  # columns


def forward(pipe: LatentDiffusionPipeline, picture: np.ndarray, *, columns: int = 8, seed: int = 0) -> Sheet:
    """A picture, uint8 (H, W, 3), under rising noise; sides must be multiples of the model's. Raises ConfigError."""
    model, values = pipe.model, to_values(picture[None])
    times = [round(t) for t in np.linspace(0, model.path.T - 1, _columns(columns) - 1)]
    x0 = pipe.encode(picture[None])
    noises = [normal(tuple(each.shape), seed, "show forward") for each in (values, x0)]
    rows: list[list[np.ndarray | None]] = [[picture], [to_uint8(pipe.decode(x0))[0]]]
    names = ["t none\nSNR inf"]
    for number in times:
        level = model.path.numbered(number)
        noisy = level.alpha * values + level.sigma * noises[0]
        latents = level.alpha * x0 + level.sigma * model.array(noises[1])
        rows[0].append(to_uint8(noisy)[0])
        rows[1].append(to_uint8(pipe.decode(latents))[0])
        names.append(f"t {level.t:g}\nSNR {level.snr:.2g}")
    title = f"The forward process of {pipe.card.name}"
    return Sheet(title, FORWARD, strip(rows, ["pixels", "latents, decoded"], names))


def reverse(pipe: LatentDiffusionPipeline, prompt: str, *, columns: int = 8, **settings: Any) -> Sheet:
    """The steps from noise to a picture of the prompt. settings: those of drawing. Raises ConfigError."""
    steps = list(pipe.stream(prompt, **settings))
    chosen = np.unique(np.linspace(0, len(steps) - 1, min(_columns(columns), len(steps))).round().astype(int))
    states = [steps[number] for number in chosen]
    together = library(states[0].x).concatenate
    if len({tuple(step.x.shape) for step in states}) > 1:
        raise ConfigError("a strip has pictures of one size: leave hires_scale out")
    rows = [list(to_uint8(pipe.decode(together([getattr(s, name)[:1] for s in states])))) for name in ("x", "x0")]
    names = [
        f"step {step.number}\nt {step.level.t:.0f}" if step.level.t >= 0 else f"step {step.number}\nclean"
        for step in states
    ]
    title = f"{pipe.card.name}: from noise to “{prompt}”"
    return Sheet(title, REVERSE, strip(rows, ["x_t", "guess of x0"], names))


def _columns(columns: int) -> int:
    if not 2 <= columns <= MOST:
        raise ConfigError(f"columns must be from 2 to {MOST} (got {columns})")
    return columns
