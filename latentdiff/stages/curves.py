"""A loss over steps as a picture: SVG, for pages that stand alone."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np

WIDTH, HEIGHT, EDGE = 480, 160, 24  # pixels
POINTS = 400  # of a line; a longer one is drawn by means of as many parts


def curve(title: str, points: Sequence[tuple[float, float]]) -> str:
    """A figure of (step, value) pairs, with their range; a single point is a line to itself. None gives nothing."""
    if not points:
        return ""
    parts = np.array_split(np.asarray(points, float), min(len(points), POINTS))
    x, y = np.array([part.mean(0) for part in parts]).T
    across = EDGE + (x - x.min()) / max(float(np.ptp(x)), 1e-12) * (WIDTH - 2 * EDGE)
    down = HEIGHT - EDGE - (y - y.min()) / max(float(np.ptp(y)), 1e-12) * (HEIGHT - 2 * EDGE)
    line = " ".join(f"{a:.1f},{d:.1f}" for a, d in zip(across, down, strict=True))
    said = f"{html.escape(title)}: {y[0]:.4g} at step {x[0]:.0f}, {y[-1]:.4g} at step {x[-1]:.0f}"
    return (
        f'<figure style="width:{WIDTH}px"><svg width="{WIDTH}" height="{HEIGHT}"><polyline points="{line}" '
        f'fill="none" stroke="#36c" stroke-width="1.5"/></svg><figcaption>{said}</figcaption></figure>'
    )
