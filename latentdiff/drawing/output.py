"""The result of a call: pictures, their records, and notes."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from latentdiff.core.arrays import library
from latentdiff.core.errors import ConfigError
from latentdiff.drawing.record import ImageMetadata

SHOWN = 192  # pixels: a notebook enlarges smaller pictures by a whole factor, at most to this width


@dataclass(frozen=True)
class Output:
    """Pictures in the order of their seeds, a record of each, and notes for the user.

    images: PIL images, or an array; see `LatentDiffusionPipeline.__call__`.
    """

    images: Any
    seeds: list[int]
    metadata: list[ImageMetadata]
    notes: list[str] = field(default_factory=list)

    def save(self, target: str | Path) -> list[Path]:
        """Write PIL images with their records, like the command line: into a folder, or a single one to a file.

        Returns the paths. Raises ConfigError for a file that exists, and for other output types.
        """
        from latentdiff.drawing.files import check_target, write_pictures

        if not isinstance(self.images, list):
            raise ConfigError('only PIL images can be saved (output_type="pil")')
        path = as_path(target)
        check_target(path, len(self.images))
        return [written for written, _ in write_pictures(self.images, self.metadata, path, ".png", metadata=True)]

    def _repr_html_(self) -> str:
        """For notebooks: PIL pictures with their prompts and seeds, small ones enlarged by pixels, and the notes."""
        rows = zip(self.images, self.seeds, self.metadata, strict=True) if isinstance(self.images, list) else ()
        cells = "".join(_figure(image, f"{record.request['prompt']} (seed {seed})") for image, seed, record in rows)
        notes = "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        return f"<div style='display:flex;flex-wrap:wrap;gap:8px'>{cells}</div>{notes}" if cells else repr(self)


def _figure(image: Any, caption: str) -> str:
    from latentdiff.drawing.files import encoded

    data = base64.b64encode(encoded(image, ".png", None)).decode()
    width = image.width * max(1, SHOWN // image.width)
    style = f"width:{width}px;max-width:100%;image-rendering:pixelated"
    picture = f"<img style='{style}' alt='' src='data:image/png;base64,{data}'>"
    below = f"<figcaption>{escape(caption)}</figcaption>"
    return f"<figure style='margin:0;max-width:{max(width, SHOWN)}px'>{picture}{below}</figure>"


def as_path(value: object) -> Path:
    """A path given as text or as a Path. Raises ConfigError for anything else."""
    if not isinstance(value, str | Path) or "\0" in str(value):
        raise ConfigError(f"a path must be text or a Path (got {str(value)[:40]!r})")
    return Path(value)


def joined(outputs: Sequence[Output]) -> Output:
    """One Output of several batches."""
    seeds = [seed for output in outputs for seed in output.seeds]
    records = [record for output in outputs for record in output.metadata]
    notes = list(dict.fromkeys(note for output in outputs for note in output.notes))
    return Output(_together([output.images for output in outputs]), seeds, records, notes)


def _together(batches: list[Any]) -> Any:
    if isinstance(batches[0], list):
        return [image for batch in batches for image in batch]
    if len({batch.shape[1:] for batch in batches}) > 1:
        raise ConfigError('pictures of several sizes cannot be one array; use output_type="pil"')
    return library(batches[0]).concatenate(batches)
