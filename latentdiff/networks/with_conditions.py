"""A backbone that adds conditions to those it is called with."""

from __future__ import annotations

from typing import Any

from latentdiff.core.arrays import Array
from latentdiff.networks.conditions import Conditions
from latentdiff.networks.protocols import Spec


class WithConditions:
    """See Backbone; all other attributes are the backbone's own. Subclasses add the conditions in `_with`."""

    def __init__(self, backbone: Any):
        self._backbone = backbone

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backbone, name)

    @property
    def dtype(self) -> Any:
        """See Backbone."""
        return self._backbone.dtype

    @property
    def spec(self) -> Spec:
        """See Backbone."""
        spec: Spec = self._backbone.spec
        return spec

    def predict(self, x: Array, time: Array, conditions: Conditions) -> Array:
        """See Backbone."""
        return self._backbone.predict(x, time, self._with(x, time, conditions))

    def predict_perturbed(self, x: Array, time: Array, conditions: Conditions) -> Array:
        """See PerturbedAttention."""
        return self._backbone.predict_perturbed(x, time, self._with(x, time, conditions))

    def _with(self, x: Array, time: Any, conditions: Conditions) -> Conditions:
        """The conditions with more arrays."""
        raise NotImplementedError
