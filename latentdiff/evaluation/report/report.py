"""A report of one model or of two side by side: its sections, each measured once, and its files.

OUT/metrics.json        every figure, with settings and versions
OUT/report.html         the same as a self-contained page, with plots and pictures
OUT/A, OUT/B            each model's intermediate results, from which an interrupted evaluation goes on
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from latentdiff.core.files import atomic, write_json
from latentdiff.data.memo import read_memo, write_memo
from latentdiff.evaluation import sections
from latentdiff.evaluation.benchmark import Benchmark, SpriteBenchmark
from latentdiff.evaluation.meaning import MEANING
from latentdiff.evaluation.pictures import read, write
from latentdiff.evaluation.report import page
from latentdiff.evaluation.report.plots import Plot, as_figure
from latentdiff.evaluation.result import Figure, Result, as_tree, finite, from_tree
from latentdiff.evaluation.sections import EvaluationSettings, References, Subject
from latentdiff.evaluation.sweep import of_sweep
from latentdiff.networks.protocols import Posterior

PAGE, METRICS = "report.html", "metrics.json"


@dataclass(frozen=True)
class Chapter:
    """The function that measures a section, and the meaning of its figures; headline: figures on top of the page."""

    measure: Callable[[Subject, References, EvaluationSettings], Result]
    text: str
    headline: tuple[str, ...] = ()


SECTIONS = {
    "likelihood": Chapter(
        sections.of_likelihood,
        "How many bits a value of a held-out picture takes: an upper bound on -log2 p(x) by the diffusion's three terms"
        " and the autoencoder's two. Captions that the model understands lower it. Figures without a suffix use the"
        " posterior's variance; all use the same draws of noise and time.",
        (
            "bits_per_dimension_with_captions",
            "gain_by_captions",
        ),
    ),
    "distances": Chapter(
        sections.of_distances,
        "How far pictures drawn from the captions are from the real ones, by a network's features. All but the kernel"
        " distance depend on the number of pictures: compare only equal numbers. floor: the distance of other real"
        " pictures, of other captions; drawn ones have the real ones' captions and may come out below.",
        (
            "frechet",
            "kernel",
            "precision",
            "recall",
            "clip_score",
        ),
    ),
    "composition": Chapter(
        sections.of_composition,
        "The share of pictures that show what their prompt says, in GenEval's six categories, as an oracle or a"
        " judge reads them. held_out: scenes with something that was never trained on, a thing in a colour or a"
        " style. ceiling: rendered scenes through the autoencoder.",
        (
            "composition",
            "composition_held_out",
        ),
    ),
    "recognition": Chapter(
        sections.of_recognition,
        "The share of pictures of one thing whose name is the judge's first, or among its first five. rendered: the"
        " thing's own picture; decoded: the same through the autoencoder, which no model can exceed. held_out: things"
        " in a style in which they were never trained on.",
        ("recognised_1", "recognised_1_held_out"),
    ),
    "autoencoder": Chapter(
        sections.of_autoencoder,
        "What is lost by the autoencoder alone: held-out pictures encoded and decoded. Latents should have a standard"
        " deviation near 1.",
        (
            "psnr",
            "ssim",
            "reconstruction_frechet",
        ),
    ),
    "diversity": Chapter(
        sections.of_diversity,
        "How different pictures of one prompt are, 1 minus the cosine of their features, beside those of different"
        " prompts; and the effective number of different pictures (Vendi score), beside that of as many real ones."
        " The rows shown are the least and the most diverse prompts.",
        ("distance_within_a_prompt",),
    ),
    "memorisation": Chapter(
        sections.of_memorisation,
        "Whether drawn pictures are copies: how near the nearest training picture is, beside how near it is to pictures"
        " that were held out.",
        ("share_nearer_than_99_of_100_held_out",),
    ),
    "sweep": Chapter(
        of_sweep,
        "Guidance, steps and samplers against each other on the same captions and seeds; times count whole batches"
        " on this machine, now.",
    ),
    "geneval": Chapter(
        sections.of_geneval,
        "Pictures of GenEval's own prompts, in the folders that its evaluator reads. They are not scored here.",
    ),
}


def lacking(name: str, subject: Subject, references: References) -> str | None:
    """Why a section cannot be measured; None if it can."""
    if name in ("composition", "recognition"):
        return _unreadable(name, subject, references.benchmark)
    if name == "memorisation" and (references.training is None or not references.has_seen):
        return "no pictures are known that the model was trained on (--training)"
    if name == "geneval" and not references.prompts:
        return "no prompts were given (--geneval)"
    if name == "likelihood" and not isinstance(subject.exact().model.codec, Posterior):
        return "a tiny VAE has no posterior, so pixels have no likelihood"
    return None


def _unreadable(name: str, subject: Subject, benchmark: Benchmark | None) -> str | None:
    """Why nothing can say what the pictures of a model show; None if something can."""
    if benchmark is None:
        return "its data are not scenes, or they show sprites and no judge was given (--judge)"
    if name == "recognition" and not isinstance(benchmark, SpriteBenchmark):
        return "it requires scenes of sprites and a judge (--judge)"
    return benchmark.lacking(subject.painter.model)


def known(subjects: Sequence[Subject], rules: Mapping[str, Any]) -> dict[str, list[Result]]:
    """The sections that earlier starts have measured for every model with the same rules."""
    by_section = {}
    for name in SECTIONS:
        results = [result for subject in subjects if (result := _kept(name, subject, rules))]
        if len(results) == len(subjects):
            by_section[name] = results
    return by_section


def _kept(name: str, subject: Subject, rules: Mapping[str, Any]) -> Result | None:
    if not (values := read_memo(_memo(name, subject), rules)):
        return None
    (tree,) = values
    files = [_example(name, subject, number) for number in range(len(tree["shown"]))]
    if not all(file.is_file() for file in files):
        return None
    return from_tree(tree, [(read(file), caption) for file, caption in zip(files, tree["shown"], strict=True)])


def _memo(name: str, subject: Subject) -> Path:
    return subject.folder / f"{name}.json"


def _example(name: str, subject: Subject, number: int) -> Path:
    return subject.folder / name / "shown" / f"{number:02d}.png"


def measure(
    name: str, subject: Subject, references: References, settings: EvaluationSettings, rules: Mapping[str, Any]
) -> Result:
    """Measure one section of one model, unless an earlier start has done so with the same rules."""
    if result := _kept(name, subject, rules):
        return result
    began = time.monotonic()
    result = SECTIONS[name].measure(subject, references, settings)
    facts = {**result.facts, "seconds": round(time.monotonic() - began, 1)}
    tree = {**as_tree(result), "facts": facts, "shown": [dict(caption) for _, caption in result.pictures]}
    for number, (picture, _) in enumerate(result.pictures):
        file = _example(name, subject, number)
        file.unlink(missing_ok=True)
        write(picture, file)
    write_memo(_memo(name, subject), rules, [tree])
    return from_tree(tree, result.pictures)


def write_report(
    folder: Path,
    subjects: Sequence[Subject],
    by_section: Mapping[str, Sequence[Result]],
    skipped: Mapping[str, str],
    settings: Mapping[str, Any],
) -> None:
    """Write the page and the figures. by_section: for each section one result per model."""
    names = [subject.name for subject in subjects]
    tree: dict[str, Any] = {"settings": dict(settings), "skipped": dict(skipped), "models": []}
    by_section = {name: by_section[name] for name in SECTIONS if name in by_section}
    for number, subject in enumerate(subjects):
        own = {name: _metrics(results[number]) for name, results in by_section.items()}
        tree["models"].append({"name": subject.name, "hash": subject.painter.model.card.hash, "sections": own})
    if len(subjects) == 2:
        tree["second_is_worse_by"] = {name: _differences(*results) for name, results in by_section.items()}
    write_json(folder / METRICS, finite(tree))
    entries = [page.Entry(key, "", tuple(_lines(value))) for key, value in settings.items()]
    titles = [*by_section, *(["not measured"] if skipped else []), "settings"]
    parts = [page.contents(titles), _summary(names, by_section)]
    parts += [_chapter(name, names, results) for name, results in by_section.items()]
    left = [page.Entry(name, why) for name, why in skipped.items()]
    parts += [page.heading("not measured"), page.listed(left)] if left else []
    parts += [page.heading("settings"), page.listed(entries)]
    title = " beside ".join(names)
    with atomic(folder / PAGE) as made:
        made.write_text(page.document(title, *parts), encoding="utf-8")


def _differences(first: Result, second: Result) -> dict[str, dict[str, float | None]]:
    """How much worse the second model's figures are, with errors, negative if better."""
    differences = {
        name: second.figures[name].worse(figure)
        for name, figure in _comparable([first, second])[0].items()
        if figure.better != "neither" and name in second.figures
    }
    return {name: {"value": figure.value, "error": figure.error} for name, figure in differences.items()}


def _metrics(result: Result) -> dict[str, Any]:
    figures = {name: asdict(figure) for name, figure in result.figures.items()}
    for figure in figures.values():
        del figure["each"]
    return {"figures": figures, "facts": dict(result.facts), "tables": [asdict(table) for table in result.tables]}


def _summary(names: Sequence[str], by_section: Mapping[str, Sequence[Result]]) -> str:
    """The headline figures of all sections."""
    models = [
        {
            name: figures[number][name]
            for section, figures in ((section, _comparable(results)) for section, results in by_section.items())
            for name in SECTIONS[section].headline
            if name in figures[number]
        }
        for number in range(len(names))
    ]
    return _figures(names, models)


def _chapter(name: str, names: Sequence[str], results: Sequence[Result]) -> str:
    facts = "; ".join(f"{key}: {value}" for key, value in _facts(results).items())
    parts = [page.heading(name), f"<p>{page.escaped(SECTIONS[name].text)}</p>"]
    parts.append(_figures(names, _comparable(results)))
    parts.append(f"<p><small>{page.escaped(facts)}</small></p>")
    parts += ["<main>", *map(as_figure, _beside(names, results)), "</main>"]
    for model, result in zip(names, results, strict=True):
        heading = [f"<h3>{page.escaped(model)}</h3>"] if len(names) > 1 else []
        tables = [f"<h4>{page.escaped(each.title)}</h4>{page.table(each.head, each.rows)}" for each in result.tables]
        parts += [*heading, page.gallery(result.pictures), *tables] if result.pictures or tables else []
    return "".join(parts)


def _beside(names: Sequence[str], results: Sequence[Result]) -> list[Plot]:
    """The plots of one model, or of both in the same axes."""
    if len(names) == 1:
        return list(results[0].plots)
    plots = []
    for each in zip(*(result.plots for result in results), strict=True):
        series = [
            replace(one, name=f"{name}: {one.name}")
            for name, plot in zip(names, each, strict=True)
            for one in plot.series
        ]
        plots.append(replace(each[0], series=series))
    return plots


def _comparable(results: Sequence[Result]) -> list[Mapping[str, Figure]]:
    """The figures of both models; bits per dimension of pictures with different sizes do not compare."""
    if len({result.facts.get("dimensions") for result in results}) == 1:
        return [result.figures for result in results]
    return [{name: replace(f, better="neither") for name, f in result.figures.items()} for result in results]


def _figures(names: Sequence[str], figures: Sequence[Mapping[str, Figure]]) -> str:
    if not figures[0]:
        return ""
    return page.table(*_rows(names, figures), notes=[MEANING.get(name, "") for name in figures[0]])


def _rows(names: Sequence[str], figures: Sequence[Mapping[str, Figure]]) -> tuple[list[str], list[list[str]]]:
    """A row a figure, a column a model, and for two models a column with the difference."""
    has_direction = any(figure.better != "neither" for figure in figures[0].values())
    head = (
        ["", *names]
        + (["better"] if has_direction else [])
        + ([f"{names[1]} is"] if has_direction and len(names) == 2 else [])
    )
    rows = []
    for name in figures[0]:
        each = [figure.get(name) for figure in figures]
        first, *others = each
        assert first is not None
        verdicts = [first.better.replace("neither", ""), *(compared(first, other) if other else "" for other in others)]
        rows.append(
            [name.replace("_", " "), *(str(figure or "") for figure in each), *(verdicts if has_direction else [])]
        )
    return head, rows


def compared(first: Figure, second: Figure) -> str:
    """Whether the second model's figure is better or worse, and by how much."""
    if first.better == "neither" or not (math.isfinite(first.value) and math.isfinite(second.value)):
        return ""
    by = second.worse(first)
    if by.value == 0:
        return "the same"
    size = Figure(abs(by.value), by.error)
    sure = by.error is None or abs(by.value) > 2 * by.error
    return f"{'worse' if by.value > 0 else 'better'} by {size}" + ("" if sure else ", within the error")


def as_lines(names: Sequence[str], name: str, results: Sequence[Result]) -> list[str]:
    """The lines of a section for a terminal."""
    head, rows = _rows(names, _comparable(results))
    lines = [f"{name} ({', '.join(f'{key} {value}' for key, value in _facts(results).items())})"]
    widths = [max(len(row[column]) for row in [head, *rows] if column < len(row)) for column in range(len(head))]
    for row in [head, *rows] if len(names) > 1 else rows:
        lines.append("  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)).rstrip())
    return lines


def _facts(results: Sequence[Result]) -> dict[str, str]:
    """The facts that figures depend on; facts that two models share appear once."""
    return {
        key: " and ".join(dict.fromkeys(_words(result.facts[key]) for result in results if key in result.facts))
        for key in results[0].facts
    }


def _words(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _lines(value: Any) -> list[str]:
    """The lines of a setting, one for each of several values."""
    if isinstance(value, Mapping):
        return [f"{key}: {_words(item)}" for key, item in value.items()]
    if isinstance(value, list):
        return [line for item in value for line in (_lines(item) or ["nothing"])]
    return [_words(value)]
