"""The conditions of two encoders that read the same prompt (Podell et al. 2023, section 2.1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from latentdiff.core.arrays import library
from latentdiff.networks.conditions import Conditions
from latentdiff.networks.encoders.prompt import Prompt


def side_by_side(first: Conditions, second: Conditions) -> Conditions:
    """Tokens (..., L, D1 + D2) of both encoders, and the pooled text of the second."""
    tokens = library(first["tokens"]).concatenate([first["tokens"], second["tokens"]], -1)
    return Conditions({"tokens": tokens, "pooled": second["pooled"]})


def with_both(first: Conditions, second: Conditions, prompt: Prompt, *, zero_empty: bool) -> Conditions:
    """The conditions of one picture, with its sizes; zero_empty: those of the empty prompt are zeros."""
    both = side_by_side(first, second)
    if zero_empty and not prompt.text:
        both = both.mapped(lambda array: library(array).zeros_like(array))
    return with_sizes(both, prompt.sizes)


def with_sizes(conditions: Conditions, sizes: Sequence[float] | None) -> Conditions:
    """The conditions of one picture with its sizes, if they are known."""
    return conditions if sizes is None else conditions.joined({"sizes": np.array(sizes, np.float32)})
