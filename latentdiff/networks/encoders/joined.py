"""The conditions of two encoders that read the same prompt (Podell et al. 2023, section 2.1)."""

from __future__ import annotations

import numpy as np

from latentdiff.core.arrays import library
from latentdiff.networks.conditions import Conditions
from latentdiff.networks.encoders.prompt import Wanted


def side_by_side(first: Conditions, second: Conditions) -> Conditions:
    """Tokens (..., L, D1 + D2) of both encoders; the pooled text is the second's."""
    tokens = library(first["tokens"]).concatenate([first["tokens"], second["tokens"]], -1)
    return Conditions({"tokens": tokens, "pooled": second["pooled"]})


def with_both(first: Conditions, second: Conditions, wanted: Wanted, *, zero_empty: bool) -> Conditions:
    """The conditions of one picture, with its sizes; zero_empty: the empty prompt is zeros."""
    both = side_by_side(first, second)
    if zero_empty and not wanted.prompt:
        both = both.mapped(lambda array: library(array).zeros_like(array))
    return both if wanted.sizes is None else both.joined({"sizes": np.array(wanted.sizes, np.float32)})
