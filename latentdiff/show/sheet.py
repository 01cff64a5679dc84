"""A sheet: a figure with a title and a sentence that says how to read it."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from latentdiff.core.errors import ConfigError
from latentdiff.core.files import write_new
from latentdiff.evaluation.report.page import document, escaped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".html")
CELL = 1.35  # inches of a picture in a strip
DOTS = 110  # per inch


@dataclass(frozen=True)
class Sheet:
    """See the module. figure: matplotlib's, which may be changed before saving."""

    title: str
    text: str
    figure: Figure

    def save(self, path: str | Path) -> Path:
        """Write a .png, a .svg, or a .html page that stands alone. Raises ConfigError; no file is overwritten."""
        target = Path(path)
        check_suffix(target)
        if target.exists():
            raise ConfigError(f"file exists ({target}). Pictures are never overwritten")
        target.parent.mkdir(parents=True, exist_ok=True)
        write_new(
            target, self._page() if target.suffix.lower() == ".html" else self._rendered(target.suffix.lower()[1:])
        )
        return target

    def _rendered(self, kind: str) -> bytes:
        import matplotlib as mpl

        content = io.BytesIO()
        with mpl.rc_context({"svg.fonttype": "none"}):  # text stays text
            self.figure.savefig(content, format=kind, dpi=DOTS)
        return content.getvalue()

    def _page(self) -> bytes:
        data = base64.b64encode(self._rendered("svg")).decode()
        picture = f'<img style="max-width:100%" alt="{escaped(self.title)}" src="data:image/svg+xml;base64,{data}">'
        return document(self.title, f"<p>{escaped(self.text)}</p>", picture).encode()

    def _repr_png_(self) -> bytes:
        """For notebooks."""
        return self._rendered("png")


def check_suffix(path: Path) -> None:
    """Raises ConfigError for a file that a sheet cannot be written as."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"a sheet is written as {', '.join(SUFFIXES)} ({path})")


def figure(width: float, height: float) -> Figure:
    """A figure of that many inches, without pyplot's global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def strip(rows: Sequence[Sequence[np.ndarray | None]], names: Sequence[str], columns: Sequence[str]) -> Figure:
    """Rows of pictures, uint8 (H, W, C) or None for an empty cell, with names on the left and above."""
    across = max(map(len, rows))
    fig = figure(CELL * across + 0.8, (CELL + 0.15) * len(rows) + 0.4)
    axes = fig.subplots(len(rows), across, squeeze=False)
    for row, pictures in enumerate(rows):
        for column in range(across):
            picture = pictures[column] if column < len(pictures) else None
            place(axes[row, column], picture)
        axes[row, 0].set_ylabel(names[row], fontsize=8)
    for column, text in enumerate(columns):
        axes[0, column].set_title(text, fontsize=8)
    return fig


def place(axes: Any, picture: np.ndarray | None, **style: Any) -> None:
    """Draw a picture into axes without ticks or a frame; None leaves them empty."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    if picture is not None:
        grey = {"cmap": "gray", "vmin": 0, "vmax": 255} if picture.ndim == 3 and picture.shape[-1] == 1 else {}
        axes.imshow(picture.squeeze(), interpolation="nearest", **(grey | style))
