"""Plots of lines and points for self-contained pages: SVG by matplotlib, without its global state."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

SIZE = 5.6, 3.2  # inches
POINTS = 400  # of a line; a longer line shows the means of as many parts


@dataclass(frozen=True)
class Series:
    """Values over x with a name: joined by a line, or single points with names."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    joined: bool = True
    named: Sequence[str] = ()


@dataclass(frozen=True)
class Plot:
    """Series over the same axes; either may be logarithmic."""

    title: str
    x: str
    y: str
    series: Sequence[Series] = field(default_factory=tuple)
    log: str = ""
    """Which axes are logarithmic: some of "xy"."""


def as_figure(plot: Plot) -> str:
    """The HTML of a plot; empty if it has no finite point."""
    curves = [(each, *_thinned(each)) for each in plot.series]
    curves = [(each, x, y) for each, x, y in curves if len(x)]
    if not curves:
        return ""
    data = base64.b64encode(_svg(plot, curves)).decode()
    title = html.escape(plot.title)
    return (
        f'<figure class="plot"><img alt="{title}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{title}</figcaption></figure>"
    )


def _thinned(series: Series) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(series.x, float), np.asarray(series.y, float)
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) <= POINTS or not series.joined:
        return x, y
    return tuple(np.array([part.mean() for part in np.array_split(values, POINTS)]) for values in (x, y))  # type: ignore[return-value]


def _svg(plot: Plot, curves: list[tuple[Series, np.ndarray, np.ndarray]]) -> bytes:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "latentdiff", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        for series, x, y in curves:
            axes.plot(x, y, "-" if series.joined and len(x) > 1 else "o", markersize=4, label=series.name)
            for name, across, up in zip(series.named, x, y, strict=False):
                axes.annotate(name, (across, up), xytext=(3, 3), textcoords="offset points", fontsize=6)
        axes.set_xlabel(plot.x)
        axes.set_ylabel(plot.y)
        for axis in plot.log:
            getattr(axes, f"set_{axis}scale")("log")
        axes.grid(alpha=0.3)
        if len(curves) > 1:
            axes.legend(frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})  # the same plot has the same bytes
    return buffer.getvalue()
