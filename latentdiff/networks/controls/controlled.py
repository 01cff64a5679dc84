"""A backbone under controls, which add residuals to its skip connections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from latentdiff.core.arrays import Array, library, zeros
from latentdiff.networks.conditions import Conditions, added
from latentdiff.networks.protocols import Backbone
from latentdiff.networks.with_conditions import WithConditions


class GivesResiduals(Protocol):
    """A network that adds to a backbone's skip connections."""

    adds: str  # RESIDUAL, or FEATURE within the levels
    once: bool  # whether it depends on the picture alone

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
    known: dict[int, list[Array]] = field(default_factory=dict)  # residuals of `once` networks, by number of rows

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
        if self.network.once and len(x) in self.known:
            return self.known[len(x)]
        hint = library(x).concatenate([self.hint] * (len(x) // len(self.hint)))
        own = self.network.residuals(x, t, conditions, hint, scale=self.scale, guess=self.guess, kind=self.kind)
        if self.network.once:
            self.known[len(x)] = own
        return own


class Controlled(WithConditions):
    """See Backbone. Residuals of several controls are added."""

    def __init__(self, backbone: Any, controls: Sequence[Control]):
        super().__init__(backbone)
        self._controls = controls

    def _with(self, x: Array, time: Any, conditions: Conditions) -> Conditions:
        """The conditions with the sum of all residuals, and of all features."""
        sums: dict[str, list[Array]] = {}
        for control in self._controls:
            if (own := control.residuals(x, time, conditions)) is not None:
                kind = control.network.adds
                sums[kind] = [a + b for a, b in zip(sums[kind], own, strict=True)] if kind in sums else own
        return conditions.joined({name: each for kind, own in sums.items() for name, each in added(own, kind).items()})


def controlled(controls: Sequence[Control]) -> Any:
    """Controls as a function from backbones to backbones."""

    def applied(backbone: Backbone) -> Backbone:
        return cast("Backbone", Controlled(backbone, controls)) if controls else backbone

    return applied
