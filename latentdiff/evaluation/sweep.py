"""A sweep over settings of drawing: quality and time of each, and the Pareto front."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from latentdiff.data.memo import read_memo, write_memo
from latentdiff.evaluation.distances import frechet
from latentdiff.evaluation.jackknife import jackknife
from latentdiff.evaluation.pictures import AT_ONCE, draw_pictures
from latentdiff.evaluation.report.plots import Plot, Series
from latentdiff.evaluation.result import Figure, Result, Table
from latentdiff.evaluation.sections import EvaluationSettings, References, Subject, clip_scores

GRID: dict[str, tuple[Any, ...]] = {
    "guidance_scale": (1.0, 2.0, 4.0),
    "num_inference_steps": (5, 10, 20),
    "sampler": ("ddim", "unipc"),
}


def combinations(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of one value each."""
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def of_sweep(subject: Subject, references: References, settings: EvaluationSettings) -> Result:
    """All combinations of the grid on a fifth of the captions: Frechet distance, CLIP score, seconds a picture."""
    count = max(16, len(references.captions) // 5)
    captions, real = references.captions[:count], references.features
    cells = []
    for chosen in combinations(settings.grid):
        cells.append((chosen, _cell(subject, references, settings, captions, real, chosen)))
    best = pareto([(cell["seconds"], cell["frechet"]) for _, cell in cells])
    fastest = cells[best[0]][1]["seconds"]
    return Result(
        {"settings_on_the_front": Figure(len(best)), "seconds_of_the_fastest": Figure(fastest)},
        {"pictures a setting": len(captions), "against": len(real), "features": references.extractor.name},
        [_plot(cells, best)],
        [_table(cells, best)],
    )


def _cell(
    subject: Subject,
    references: References,
    settings: EvaluationSettings,
    captions: Sequence[str],
    real: np.ndarray,
    chosen: dict[str, Any],
) -> dict[str, float]:
    """The figures of one combination, measured once."""
    name = " ".join(f"{key}={value}" for key, value in chosen.items())
    path = subject.folder / "sweep" / f"{hashlib.sha256(repr(chosen).encode()).hexdigest()[:16]}.json"
    rules = [chosen, settings.drawing, len(captions), references.extractor.hash]
    if kept := read_memo(path, rules):
        return dict(kept[0])
    drawing = {"seed": settings.seed, **settings.drawing, **chosen}
    draw_pictures(
        subject.painter, captions[:AT_ONCE], title=f"{name}, once before it is timed", **drawing
    )  # the first drawing may compile
    began = time.perf_counter()
    images = draw_pictures(subject.painter, captions, title=name, **drawing)
    seconds = (time.perf_counter() - began) / len(captions)
    far = jackknife(frechet, references.extractor.of(images), real)
    cell = {"seconds": seconds, "frechet": far.value, "frechet_error": far.error or 0.0}
    if references.scorer is not None:
        cell["clip_score"] = float(clip_scores(references.scorer, captions, images).mean())
    write_memo(path, rules, [cell])
    return cell


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """The indices of the points on the Pareto front (lower is better), in order of their first coordinate."""
    front: list[int] = []
    for number in sorted(range(len(points)), key=lambda n: points[n]):
        if not front or points[number][1] < points[front[-1]][1]:
            front.append(number)
    return front


def _plot(cells: Sequence[tuple[dict[str, Any], dict[str, float]]], best: Sequence[int]) -> Plot:
    front = [cells[number] for number in best]
    seconds = [cell["seconds"] for _, cell in cells]
    series = [
        Series("settings", seconds, [cell["frechet"] for _, cell in cells], joined=False),
        Series(
            "Pareto front",
            [cell["seconds"] for _, cell in front],
            [cell["frechet"] for _, cell in front],
            named=[" ".join(map(str, chosen.values())) for chosen, _ in front],
        ),
    ]
    return Plot("quality against time", "seconds a picture", "Frechet distance", series, log="xy")


def _table(cells: Sequence[tuple[dict[str, Any], dict[str, float]]], best: Sequence[int]) -> Table:
    names = {"seconds": "seconds a picture", "frechet_error": "\N{PLUS-MINUS SIGN}", "clip_score": "clip score"}
    head = [*cells[0][0], *(names.get(name, name) for name in cells[0][1]), "on the front"]
    rows = [
        [*map(str, chosen.values()), *(f"{value:.4g}" for value in cell.values()), "yes" if number in best else ""]
        for number, (chosen, cell) in enumerate(cells)
    ]
    return Table("every setting", head, rows)
