"""Pictures drawn and written batch by batch, numbered, divided between processes, resumed.

The batch and the number of a picture depend only on the command. So the pictures are the same, to the bit on one kind
of machine, for any number of processes and kills: if a picture is missing, its whole batch is drawn again, and only
missing files are written.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentdiff.cli import terminal
from latentdiff.core.errors import ConfigError
from latentdiff.drawing.files import numbered, suffix_of, write_pictures

if TYPE_CHECKING:
    from latentdiff.drawing.batch import Job
    from latentdiff.drawing.painter import Painter
    from latentdiff.drawing.record import ImageMetadata

Numbered = tuple[int, "Job"]  # a picture's number in the command, from 1, and the picture
_RUN_FIELDS = ("runtime", "device", "dtype", "speed", "versions", "batch", "model", "model_source", "variant")


@dataclass(frozen=True)
class Target:
    """The output of pictures. resume: existing files are kept and skipped. steps_gif: an animation beside each."""

    path: Path
    suffix: str
    metadata: bool
    resume: bool = False
    steps_gif: bool = False


@dataclass(frozen=True)
class Process:
    """The rank and the number of processes, from the launcher's environment. Processes do not communicate."""

    number: int = 0
    processes: int = 1
    on_machine: int = 0

    @classmethod
    def of_launcher(cls) -> Process:
        """Read the environment. Raises ConfigError for values that no launcher sets."""
        defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        values = [os.environ.get(name, default) for name, default in defaults.items()]
        if not all(number.isdecimal() and len(number) < 10 for number in values) or int(values[0]) >= int(values[1]):
            raise ConfigError(
                f"RANK, WORLD_SIZE and LOCAL_RANK must be numbers, RANK below WORLD_SIZE (got {', '.join(values)})"
            )
        return cls(*map(int, values))

    def device(self, named: str | None) -> str | None:
        """The user's device; by default each of several processes has its own GPU, if there are any."""
        from latentdiff.runtime.choice import gpu_is_there

        alone = self.processes == 1 or named not in (None, "cuda")
        return named if alone or not gpu_is_there() else f"cuda:{self.on_machine}"


def write_all(
    painter: Painter, jobs: Sequence[Job], target: Target, process: Process
) -> Iterator[tuple[Path, ImageMetadata]]:
    """Draw this process's batches with a progress bar; yield every written picture. Raises ConfigError."""
    from latentdiff.drawing.batch import Batch
    from latentdiff.drawing.cascade import steps_of
    from latentdiff.drawing.draw import Drawing, record_of
    from latentdiff.drawing.record import save_options

    batches = _batches(painter, jobs, target, process)
    total = sum(steps_of(batch[0][1], painter.cascade) for batch in batches)
    written: set[str] = set()
    if target.metadata and target.suffix != ".png":
        for job in jobs:  # a record that is too long is refused before drawing
            save_options(record_of(painter, job), target.suffix)
    with _bar(total) as bar:
        for batch in batches:
            drawing = Drawing(painter, Batch([job for _, job in batch]))
            walked = []
            for step in drawing:
                bar.update()
                latents = step.x
                walked += [latents] if target.steps_gif else []
            output = drawing.finish(latents)
            bar.clear()  # end the bar's line
            for note in set(output.notes) - written:
                terminal.warning(note)
            written |= set(output.notes)
            paths = _paths(batch, target, process)
            records = output.metadata
            for path, record in write_pictures(
                output.images, records, target.path, target.suffix, target.metadata, paths
            ):
                if target.steps_gif:
                    index = next(index for index, each in enumerate(records) if each is record)
                    _write_animation(painter, walked, index, path)
                yield path, record
            for index, picture in enumerate(_without_animation(batch, target)):
                if picture is not None:
                    _write_animation(painter, walked, index, picture)
            bar.refresh()


def _without_animation(batch: Sequence[Numbered], target: Target) -> list[Path | None]:
    """A path for each picture that an earlier start has written without its animation, otherwise None."""
    if not (target.steps_gif and target.resume):
        return []
    paths = [_path(number, job, target) for number, job in batch]
    return [None if os.path.lexists(path.with_suffix(".gif")) else path for path in paths]


def _write_animation(painter: Painter, walked: Sequence[Any], index: int, picture: Path) -> None:
    """Write the decoded latents of every step of a batch's picture beside it."""
    from latentdiff.core.files import write_new
    from latentdiff.core.images import to_uint8
    from latentdiff.drawing.pixels import decode
    from latentdiff.drawing.sheet import animation

    frames = [to_uint8(decode(painter.model, latents[index : index + 1]))[0] for latents in walked]
    write_new(picture.with_suffix(".gif"), animation(frames))


def _batches(painter: Painter, jobs: Sequence[Job], target: Target, process: Process) -> list[list[Numbered]]:
    """The batches of one process, without those whose files exist."""
    from latentdiff.drawing.draw import batches_of

    counted = iter(range(1, len(jobs) + 1))
    batches = [[(next(counted), job) for job in batch.jobs] for batch in batches_of(painter, jobs)]
    own = batches[process.number :: process.processes]
    if not target.resume:
        if process.processes > 1:
            _check_free([_path(number, job, target) for batch in own for number, job in batch], target)
        return own
    there: set[int] = set()
    otherwise: set[str] = set()
    for number, job in chain.from_iterable(own):
        if os.path.lexists(path := _path(number, job, target)):
            if not target.steps_gif or os.path.lexists(path.with_suffix(".gif")):
                there.add(number)
            otherwise |= {_drawn_by(painter, number, job, target)} if target.metadata else set()
        else:
            _check_free([path], target)
    for how in sorted(otherwise - {""}):
        terminal.warning(f"some existing pictures were drawn {how}")
    if there:
        terminal.note(f"{len(there):,} of {sum(map(len, own)):,} pictures are there already")
    return [batch for batch in own if not all(number in there for number, _ in batch)]


def _paths(batch: Sequence[Numbered], target: Target, process: Process) -> list[Path | None] | None:
    """A file for each picture of a batch, None for an existing one; no list at all if pictures take free numbers."""
    if not target.resume and process.processes == 1:
        return None
    paths = [_path(number, job, target) for number, job in batch]
    return [None if target.resume and os.path.lexists(path) else path for path in paths]


def _path(number: int, job: Job, target: Target) -> Path:
    return target.path if suffix_of(target.path) else numbered(target.path, number, job.seed, target.suffix)


def _check_free(paths: Sequence[Path], target: Target) -> None:
    """Raises ConfigError, before drawing, if a picture exists that would be written, or an animation of another."""
    for path in paths:
        if os.path.lexists(path):
            raise ConfigError(f"file exists ({path}). Use --resume, or name another folder")
        if target.steps_gif and os.path.lexists(gif := path.with_suffix(".gif")):
            raise ConfigError(f"file exists ({gif}). Pictures are never overwritten")


def _drawn_by(painter: Painter, number: int, job: Job, target: Target) -> str:
    """How an existing picture was drawn, if it would be drawn differently now, otherwise "".

    Raises ConfigError if the file is another picture.
    """
    from dataclasses import asdict

    from latentdiff.drawing.draw import record_of
    from latentdiff.drawing.reproduce import read_record

    path = _path(number, job, target)
    kept, expected = read_record(path).model_dump(), asdict(record_of(painter, job))
    differing = [name for name in expected if name not in _RUN_FIELDS and kept[name] != expected[name]]
    if differing:
        raise ConfigError(f"{path} is another picture ({differing[0]} differs). Name another folder")
    then, now = (f"by {of['runtime']} in {of['dtype']}, {of['speed']}" for of in (kept, expected))
    return "" if then == now else f"{then}, the rest {now}"


def _bar(steps: int) -> Any:
    """A progress bar, if standard error is a terminal; otherwise tqdm is not imported."""
    if not sys.stderr.isatty():
        return _NoBar()
    from tqdm import tqdm

    return tqdm(total=steps, unit="step")


class _NoBar(AbstractContextManager[Any]):
    """A progress bar that shows nothing."""

    def __exit__(self, *_: object) -> None:
        """Close nothing."""

    def update(self) -> None:
        """Show nothing."""

    clear = refresh = update
