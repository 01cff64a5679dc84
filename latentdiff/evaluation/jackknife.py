"""Standard errors of statistics that are no means, by leaving out every tenth of their rows (Efron 1982, eq. 3.1).

    error^2 = (g - 1) / g  sum over parts i of (statistic without part i - their mean)^2        g = 10

On average it is right where two sets differ. Where they are of one distribution, distances between them are near the
least that they can be, and it is too large, by a half or twice. Of ten parts, it is itself known to about a quarter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from latentdiff.evaluation.result import Better, Figure, mean

PARTS = 10


def jackknife(
    statistic: Callable[..., float], *sets: NDArray[np.floating], better: Better = "neither", often: int | None = None
) -> Figure:
    """A statistic of sets of rows, with its standard error.

    The same part of every set is left out at once, so that sets may be of pairs. What the value is the mean of, `each`,
    may be subtracted between two models on the same rows. often: the most rows for which the statistic is computed
    eleven times; of more it has no error.
    """
    value = statistic(*sets)
    if often is not None and max(map(len, sets)) > often:
        return Figure(value, better=better)
    number = min(PARTS, *map(len, sets))
    cut = zip(*(parts(len(rows), number) for rows in sets), strict=True)
    without = [statistic(*(np.delete(rows, part, 0) for rows, part in zip(sets, each, strict=True))) for each in cut]
    return jackknifed(value, without, better)


def parts(count: int, number: int = PARTS) -> list[slice]:
    """Of that many rows, one behind the other."""
    edges = np.linspace(0, count, number + 1).astype(int)
    return [slice(first, last) for first, last in pairwise(edges.tolist())]


def jackknifed(value: float, without: Sequence[float], better: Better = "neither") -> Figure:
    """Of a statistic, and of what it is without each part."""
    left = np.array(without)
    figure = mean(value + (len(left) - 1) * (left.mean() - left), better, paired=True)
    return replace(figure, value=value)
