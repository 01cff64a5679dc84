"""The result of a measurement: figures with errors and directions, the facts they depend on, tables and pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from latentdiff.evaluation.report.plots import Plot, Series

Better = Literal["lower", "higher", "neither"]


@dataclass(frozen=True)
class Figure:
    """A number, its standard error if known, and the direction that is better.

    each: the values of which it is the mean, if another model's values have the same pictures and draws.
    """

    value: float
    error: float | None = None
    better: Better = "neither"
    each: Sequence[float] = ()

    def worse(self, than: Figure) -> Figure:
        """How much worse it is than another, negative if better; the error of paired values is that of differences."""
        sign = 1 if self.better == "lower" else -1
        if self.each and len(self.each) == len(than.each):
            return mean(sign * (np.array(self.each) - np.array(than.each)))
        errors = (self.error, than.error)
        error = None if None in errors else float(np.hypot(*errors))  # type: ignore[arg-type]
        return Figure(sign * (self.value - than.value), error)

    def __str__(self) -> str:
        """The number and its error, with two digits of the error."""
        if self.error is None:
            return f"{self.value:.4g}"
        if not 1e-6 < self.error < 100:
            return f"{self.value:.4g} \N{PLUS-MINUS SIGN} {self.error:.2g}"
        digits = max(0, 1 - math.floor(math.log10(self.error)))
        return f"{self.value:.{digits}f} \N{PLUS-MINUS SIGN} {self.error:.{digits}f}"


@dataclass(frozen=True)
class Table:
    """A table of text with a title."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Result:
    """The result of one section. facts: facts that the figures depend on; pictures: uint8 (H, W, C) with captions."""

    figures: Mapping[str, Figure]
    facts: Mapping[str, Any]
    plots: Sequence[Plot] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[tuple[np.ndarray, Mapping[str, str]]] = field(default_factory=tuple)


def mean(values: Any, better: Better = "neither", *, paired: bool = False) -> Figure:
    """The mean of independent values with its standard error; paired: other models have values of the same draws."""
    values = np.asarray(values, float)
    error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return Figure(float(values.mean()), error, better, tuple(values.tolist()) if paired else ())


def as_tree(result: Result) -> dict[str, Any]:
    """All but the pictures, for JSON: numbers that are not finite become null."""
    tree: dict[str, Any] = {
        "figures": {name: asdict(figure) for name, figure in result.figures.items()},
        "facts": dict(result.facts),
    }
    tree |= {"plots": [asdict(plot) for plot in result.plots], "tables": [asdict(table) for table in result.tables]}
    return dict(finite(tree))


def from_tree(tree: Mapping[str, Any], pictures: Sequence[tuple[np.ndarray, Mapping[str, str]]] = ()) -> Result:
    """The inverse of `as_tree`."""
    figures = {name: Figure(**_nan(figure)) for name, figure in tree["figures"].items()}
    plots = [Plot(**{**plot, "series": [Series(**_nan(each)) for each in plot["series"]]}) for plot in tree["plots"]]
    return Result(figures, tree["facts"], plots, [Table(**table) for table in tree["tables"]], pictures)


def finite(value: Any) -> Any:
    """A tree for JSON, in which numbers that are not finite are null."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [finite(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def _nan(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A number, or NaN for null; an error may be unknown."""

    def back(key: str, value: Any) -> Any:
        if isinstance(value, list):
            return [back("", item) for item in value]
        return math.nan if value is None and key != "error" else value

    return {key: back(key, value) for key, value in tree.items()}
