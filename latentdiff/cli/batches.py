"""Pictures drawn batch by batch and written: numbered, processd between processes, gone on with.

A picture's batch and number follow from the command alone. So the pictures are the same, to the bit on one kind of
machine, however many processes draw them and however often they are killed: a batch of which one is missing is drawn
again whole, and only what is missing is written.
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

from latentdiff.core.errors import ConfigError
from latentdiff.drawing.files import numbered, suffix_of, write_pictures

if TYPE_CHECKING:
    from latentdiff.drawing.batch import Job
    from latentdiff.drawing.painter import Painter
    from latentdiff.drawing.record import ImageMetadata

Numbered = tuple[int, "Job"]  # a picture and its number in the command, from 1
_OF_A_RUN = ("runtime", "device", "dtype", "speed", "versions", "batch", "model", "model_source", "variant")


@dataclass(frozen=True)
class Target:
    """Where pictures go. resume: those that are there are kept and skipped."""

    path: Path
    suffix: str
    metadata: bool
    resume: bool = False


@dataclass(frozen=True)
class Process:
    """Which of how many processes this is, as `accelerate launch` and torchrun tell them; they need not speak."""

    number: int = 0
    processes: int = 1
    on_machine: int = 0

    @classmethod
    def of_launcher(cls) -> Process:
        """As the environment tells it. Raises ConfigError for what no launcher says."""
        defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        values = [os.environ.get(name, default) for name, default in defaults.items()]
        if not all(number.isdecimal() and len(number) < 10 for number in values) or int(values[0]) >= int(values[1]):
            raise ConfigError(f"RANK, WORLD_SIZE and LOCAL_RANK are {', '.join(values)}, which no launcher sets")
        return cls(*map(int, values))

    def device(self, named: str | None) -> str | None:
        """Of several processes each takes a GPU of its own, where there are any."""
        from latentdiff.runtime.choice import gpu_is_there

        alone = self.processes == 1 or named not in (None, "cuda")
        return named if alone or not gpu_is_there() else f"cuda:{self.on_machine}"


def write_all(
    painter: Painter, jobs: Sequence[Job], target: Target, process: Process
) -> Iterator[tuple[Path, ImageMetadata]]:
    """Draw this process's batches under a progress bar and yield every picture written. Raises ConfigError."""
    from latentdiff.drawing.batch import Batch
    from latentdiff.drawing.draw import Drawing, record_of
    from latentdiff.drawing.record import save_options

    batches = _batches(painter, jobs, target, process)
    total = sum(sum(batch[0][1].plan.steps) for batch in batches)
    written: set[str] = set()
    if target.metadata and target.suffix != ".png":
        for job in jobs:  # a record that does not fit is known before anything is drawn
            save_options(record_of(painter, job), target.suffix)
    with _bar(total) as bar:
        for batch in batches:
            drawing = Drawing(painter, Batch([job for _, job in batch]))
            for step in drawing:
                bar.update()
                latents = step.x
            output = drawing.finish(latents)
            bar.clear()  # else what is written next stands behind it
            for note in set(output.notes) - written:
                print(f"warning: {note}", file=sys.stderr)
            written |= set(output.notes)
            paths = _paths(batch, target, process)
            records = output.metadata
            yield from write_pictures(output.images, records, target.path, target.suffix, target.metadata, paths)
            bar.refresh()


def _batches(painter: Painter, jobs: Sequence[Job], target: Target, process: Process) -> list[list[Numbered]]:
    """Those of one process, every so many of the command's, without those that are there."""
    from latentdiff.drawing.draw import batches_of

    counted = iter(range(1, len(jobs) + 1))
    batches = [[(next(counted), job) for job in batch.jobs] for batch in batches_of(painter, jobs)]
    own = batches[process.number :: process.processes]
    if not target.resume:
        if process.processes > 1:
            _check_free([_path(number, job, target) for batch in own for number, job in batch])
        return own
    there: set[int] = set()
    otherwise: set[str] = set()
    for number, job in chain.from_iterable(own):
        if os.path.lexists(_path(number, job, target)):
            there.add(number)
            otherwise |= {_otherwise(painter, number, job, target)} if target.metadata else set()
    for how in sorted(otherwise - {""}):
        print(f"warning: some that are there were drawn {how}", file=sys.stderr)
    if there:
        print(f"{len(there):,} of {sum(map(len, own)):,} pictures are there already", file=sys.stderr)
    return [batch for batch in own if not all(number in there for number, _ in batch)]


def _paths(batch: Sequence[Numbered], target: Target, process: Process) -> list[Path | None] | None:
    """A file for each picture of a batch, None for one that is there; or none, where the next free number is taken."""
    if not target.resume and process.processes == 1:
        return None
    paths = [_path(number, job, target) for number, job in batch]
    return [None if target.resume and os.path.lexists(path) else path for path in paths]


def _path(number: int, job: Job, target: Target) -> Path:
    return target.path if suffix_of(target.path) else numbered(target.path, number, job.seed, target.suffix)


def _check_free(paths: Sequence[Path]) -> None:
    """Several processes number their pictures from 1: before any is drawn. Raises ConfigError."""
    for path in paths:
        if os.path.lexists(path):
            raise ConfigError(f"file exists ({path}). Go on by --resume, or name another folder")


def _otherwise(painter: Painter, number: int, job: Job, target: Target) -> str:
    """How a picture that is there was drawn, where that is not how it would be now; "" where it is.

    Raises ConfigError for a file of its name that is another picture.
    """
    from dataclasses import asdict

    from latentdiff.drawing.draw import record_of
    from latentdiff.drawing.reproduce import read_record

    path = _path(number, job, target)
    kept, wanted = read_record(path).model_dump(), asdict(record_of(painter, job))
    differing = [name for name in wanted if name not in _OF_A_RUN and kept[name] != wanted[name]]
    if differing:
        raise ConfigError(f"{path} is another picture ({differing[0]} differs). Name another folder")
    then, now = (f"by {of['runtime']} in {of['dtype']}, {of['speed']}" for of in (kept, wanted))
    return "" if then == now else f"{then}, the rest {now}"


def _bar(steps: int) -> Any:
    """Of progress, where someone looks; what is for no one is not imported."""
    if not sys.stderr.isatty():
        return _NoBar()
    from tqdm import tqdm

    return tqdm(total=steps, unit="step")


class _NoBar(AbstractContextManager[Any]):
    """Takes what a bar takes."""

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""

    def update(self) -> None:
        """Nothing to show."""

    clear = refresh = update
