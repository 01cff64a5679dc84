"""The noise levels of a model's path, how its loss weighs them, and where each grid of steps lies on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from latentdiff.core.errors import ConfigError
from latentdiff.diffusion.grids import GRIDS
from latentdiff.show.sheet import Sheet, figure

if TYPE_CHECKING:
    from latentdiff.pipeline import LatentDiffusionPipeline

TEXT = (
    "Above: the scales of signal and noise, x_t = alpha x0 + sigma noise, and the logarithm of their ratio. "
    "Below: the weight of the squared error at each time under each weighting, and the levels of each grid of steps."
)
_FEW = 1e-3  # of signal: below it the SNR of zero-terminal schedules leaves the plot


def schedule(pipe: LatentDiffusionPipeline, steps: int = 20) -> Sheet:
    """The schedule of a model, with the grids at so many steps. Raises ConfigError."""
    from latentdiff.diffusion.objective import WEIGHTINGS, weights

    path, prediction = pipe.model.path, pipe.model.prediction
    if not 1 <= steps <= path.T:
        raise ConfigError(f"steps must be from 1 to {path.T} (got {steps})")
    levels = [path.numbered(number) for number in range(path.T)]
    t = np.array([level.t for level in levels])
    alpha, sigma = np.array([level.alpha for level in levels]), np.array([level.sigma for level in levels])
    fig = figure(9.5, 6.5)
    (scales, ratio), (loss, grids) = fig.subplots(2, 2)
    scales.plot(t, alpha, label="alpha, signal")
    scales.plot(t, sigma, label="sigma, noise")
    scales.set(xlabel="t", title="scales")
    signal = alpha > _FEW
    ratio.plot(t[signal], 2 * np.log10(alpha[signal] / sigma[signal]))
    ratio.axhline(0, color="gray", linewidth=0.5)
    ratio.set(xlabel="t", title="log10 of the signal-to-noise ratio")
    for weighting in WEIGHTINGS:
        loss.plot(t, weights(path, prediction, weighting), label=weighting)
    loss.set(xlabel="t", title=f"weight of the error of the network's {prediction}", yscale="log")
    for row, name in enumerate(GRIDS):
        times = [level.t for level in path.levels(steps, name)[:-1]]
        grids.plot(times, [row] * len(times), "|", markersize=9)
    grids.set(xlabel="t", title=f"grids of {steps} steps", yticks=range(len(GRIDS)), yticklabels=GRIDS)
    grids.invert_yaxis()
    for axes in (scales, loss):
        axes.legend(frameon=False, fontsize=8)
    for axes in (scales, ratio, loss, grids):
        axes.grid(alpha=0.3)
    return Sheet(f"The noise schedule of {pipe.card.name}", TEXT, fig)
