"""A backbone of a mean flow, which reads at each step the time where the step ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, cast

import numpy as np

from latentdiff.core.arrays import Array
from latentdiff.networks.conditions import Conditions
from latentdiff.networks.protocols import Backbone
from latentdiff.networks.with_conditions import WithConditions


class WithStepEnds(WithConditions):
    """See Backbone. ends: the time where the step from each time ends; other times end where they begin."""

    def __init__(self, backbone: Any, ends: dict[float, float], array: Callable[[Array], Array]):
        super().__init__(backbone)
        self._ends, self._array = ends, array

    def predict_from(self, x: Array, time: Array, conditions: Conditions, deep: Array | None) -> tuple[Array, Array]:
        """See DeepFeatures."""
        features: tuple[Array, Array] = self._backbone.predict_from(x, time, self._with(x, time, conditions), deep)
        return features

    def _with(self, x: Array, time: Array, conditions: Conditions) -> Conditions:
        rows = (conditions.count, len(x)) if conditions.count else (len(x),)
        end = self._ends.get(float(time), float(time))
        return conditions.joined({"until": self._array(np.full(rows, end, np.float32))})


def averaging(backbone: Backbone, times: Sequence[float], array: Callable[[Array], Array]) -> Backbone:
    """A backbone that reads `until` under a walk through these times, descending; any other as it is."""
    if "until" not in backbone.spec.reads:
        return backbone
    return cast("Backbone", WithStepEnds(backbone, dict(pairwise(times)), array))
