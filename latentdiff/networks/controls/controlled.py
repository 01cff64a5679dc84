"""A backbone under controls, which add residuals to its skip connections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from latentdiff.core.arrays import Array, library, zeros
from latentdiff.networks.conditions import Conditions, residual_names
from latentdiff.networks.protocols import Backbone, Spec


class GivesResiduals(Protocol):
    """A network that adds to a backbone's skip connections."""

    @property
    def guesses(self) -> bool:
        """Whether it acts on the prompt's condition alone, not on the negative one."""
        ...

    def residuals(
        self, x: Array, t: Any, conditions: Conditions, hint: Array, *, scale: float, guess: bool, kind: int
    ) -> list[Array]:
        """Residuals for each skip connection, (B, C, h, w), then the middle's."""
        ...


@dataclass(frozen=True)
class Control:
    """A control of one batch.

    hint: its picture (B, C, H, W) in [0, 1]. times: the last and the first time at which it acts, the last not
    included. guess: whether it acts on the prompt's condition alone. kind: of its picture, if the network knows
    several.
    """

    network: GivesResiduals
    hint: Array
    scale: float = 1.0
    times: tuple[float, float] = (-float("inf"), float("inf"))
    guess: bool = False
    kind: int = 0

    def residuals(self, x: Array, t: float, conditions: Conditions) -> list[Array] | None:
        """The residuals as the backbone reads them, (B, ...), or (K, B, ...) under K conditions; None if it is off."""
        if not self.times[0] < float(t) <= self.times[1]:
            return None
        count, guess = conditions.count, self.guess or self.network.guesses
        if count and guess:  # zeros for all conditions but the last, the prompt's
            last = conditions.mapped(lambda array: array[-1])
            own = self._computed(x, t, Conditions(last.arrays))
            stack = library(x).stack
            return [stack([*[zeros(each, tuple(each.shape))] * (count - 1), each]) for each in own]
        if not count:
            return self._computed(x, t, Conditions(conditions.arrays))
        copies = library(x).concatenate([x] * count)
        own = self._computed(copies, t, Conditions(conditions.flattened().arrays))
        return [each.reshape(count, len(x), *each.shape[1:]) for each in own]

    def _computed(self, x: Array, t: float, conditions: Conditions) -> list[Array]:
        copies = len(x) // len(self.hint)
        hint = library(x).concatenate([self.hint] * copies)
        return self.network.residuals(x, t, conditions, hint, scale=self.scale, guess=self.guess, kind=self.kind)


class Controlled:
    """See Backbone. Residuals of several controls are added."""

    def __init__(self, backbone: Any, controls: Sequence[Control]):
        self._backbone, self._controls = backbone, controls

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
        """The conditions with the sum of all residuals."""
        each = [control.residuals(x, time, conditions) for control in self._controls]
        active = [residuals for residuals in each if residuals is not None]
        if not active:
            return conditions
        sums = [sum(column[1:], column[0]) for column in zip(*active, strict=True)]
        return conditions.joined(dict(zip(residual_names(len(sums)), sums, strict=True)))


def controlled(controls: Sequence[Control]) -> Any:
    """Controls as a function from backbones to backbones."""

    def applied(backbone: Backbone) -> Backbone:
        return cast("Backbone", Controlled(backbone, controls)) if controls else backbone

    return applied
