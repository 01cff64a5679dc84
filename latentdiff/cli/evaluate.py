"""`latentdiff evaluate`: how good a model is, in one report."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentdiff.cli import report_folder, terminal
from latentdiff.cli.loading import adapter_and_weight, common_settings, embedding_and_word, load_extras, loaded
from latentdiff.cli.options import A_MODEL, Precision, Runtime
from latentdiff.cli.variations import grid_of
from latentdiff.core.errors import ConfigError

if TYPE_CHECKING:
    from latentdiff.drawing.painter import Painter
    from latentdiff.evaluation.evaluate import Candidate

OWN = ("seed", "num_images", "width", "height", "prompt_weights", "hires_scale", "hires_strength")
LACKING = ("autoguidance_scale", "strength", "prediction")


def evaluate(
    model: Annotated[str | None, typer.Argument(help=A_MODEL)] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", help="Captioned pictures: a folder, .parquet, .tar, or a run's config.toml (default: scenes)."
        ),
    ] = None,
    report: Annotated[Path, typer.Option("--report", "-o", help="The folder for report.html and metrics.json.")] = Path(
        "report"
    ),
    compare: Annotated[
        str | None, typer.Option(help="Another model, measured on the same draws for comparison.")
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            help="Some of likelihood, distances, composition, recognition, autoencoder, diversity, memorisation, sweep,"
            " geneval, separated by commas (default: all that are possible)."
        ),
    ] = None,
    pictures: Annotated[
        int,
        typer.Option(
            min=16,
            max=50_000,
            help="Number of reference pictures; the likelihood uses a quarter, each category a tenth, ...",
        ),
    ] = 1000,
    times: Annotated[int, typer.Option(min=1, max=1000, help="Random times per picture, for the likelihood.")] = 8,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="Seed of pictures, noise and times.")] = 0,
    steps: Annotated[int | None, typer.Option("--steps", help="Sampling steps (default: the model's).")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option("--guidance-scale", "--cfg", help="Classifier-free guidance; 1 is none.")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="The sampler (default: the model's).")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting of drawing, NAME=VALUE; may be repeated.")
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            help="Values of the sweep, NAME=VALUE,VALUE; may be repeated (default: guidance, steps, samplers)."
        ),
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option(
            help="The network of distances: CLIP in open_clip's format, a model that has one, or FID's Inception as"
            " .safetensors (default: the model's own CLIP, or that of scenes-64)."
        ),
    ] = None,
    lpips: Annotated[Path | None, typer.Option(help="Weights of LPIPS as .safetensors, for the autoencoder.")] = None,
    training: Annotated[
        str | None, typer.Option(help="Pictures that the model was trained on, to search for copies.")
    ] = None,
    geneval: Annotated[
        Path | None,
        typer.Option(help="GenEval's evaluation_metadata.jsonl, whose prompts are drawn for its evaluator."),
    ] = None,
    judge: Annotated[
        Path | None,
        typer.Option(help="The judge that names what pictures of sprites show (scripts/judge.py trains one)."),
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out unusable pictures.")] = False,
    allow_missing_captions: Annotated[
        bool, typer.Option("--allow-missing-captions", help="Give pictures without a caption the empty one.")
    ] = False,
    lora: Annotated[
        list[str] | None, typer.Option(help="An adapter and its weight, PATH:0.8; may be repeated.")
    ] = None,
    embedding: Annotated[
        list[str] | None, typer.Option(help="Learnt words, PATH or WORD=PATH; may be repeated.")
    ] = None,
    vae: Annotated[Path | None, typer.Option(help="Another VAE for the same latents.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub id: commit, tag or branch.")] = None,
    variant: Annotated[str | None, typer.Option(help="Variant of a folder's weights: fp16, ...")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... (default: cuda where there is one).")] = None,
    dtype: Annotated[Precision | None, typer.Option(help="Precision of drawing (default: the runtime's).")] = None,
    runtime: Annotated[
        Runtime, typer.Option(help="Runtime of drawing. auto: OpenVINO on a CPU if the model has an export.")
    ] = Runtime.auto,
) -> None:
    """Measure a model: likelihood, distances, composition, autoencoder, diversity, copies, settings.

    After an interruption run the same command to resume. Figures go to standard output, progress to standard error.
    """
    from latentdiff.evaluation.evaluate import Sources, references_of, rules_of, sized, titles
    from latentdiff.evaluation.report.report import PAGE, as_lines, known, lacking, measure, write_report
    from latentdiff.evaluation.sections import EvaluationSettings, Subject
    from latentdiff.training.lock import locked

    drawing = _drawing({"num_inference_steps": steps, "guidance_scale": guidance_scale, "sampler": sampler}, settings)
    names = _names(only)
    if sweep and "sweep" not in names:
        raise ConfigError("--sweep requires the section sweep: name it in --only")
    grid = _grid(sweep or [], drawing if "sweep" in names else {})
    report_folder.check(report, data)
    adapters = [adapter_and_weight(each) for each in lora or []]
    words = [embedding_and_word(each) for each in embedding or []]
    beside = {
        "loras": adapters,
        "words": words,
        "vae": vae,
        "variant": variant,
        "revision": revision,
    }
    candidates = [_candidate(model, runtime, dtype, device=device, **beside)]
    if compare is not None:
        candidates.append(_candidate(compare, runtime, dtype, device=device))
    lenient = {"data.pictures.skip_bad": skip_bad, "data.pictures.allow_missing_captions": allow_missing_captions}
    sources = Sources(
        data, training, features, lpips, geneval, judge, [(key, True) for key, on in lenient.items() if on]
    )
    references, identity = references_of(candidates[0], sources, pictures, report, terminal.note)
    evaluation = EvaluationSettings(seed, times, drawing | sized(candidates), grid)
    subjects = [
        Subject(name, each.painter, each.exact, report / letter)
        for each, name, letter in zip(candidates, titles(candidates), "AB", strict=False)
    ]
    rules = rules_of(candidates, identity, references, evaluation)
    why = {name: [lacking(name, subject, references) for subject in subjects] for name in names}
    skipped = {name: next(reason for reason in reasons if reason) for name, reasons in why.items() if any(reasons)}
    if only is not None and skipped:
        name, reason = next(iter(skipped.items()))
        raise ConfigError(f"{name} cannot be measured: {reason}")
    with locked(report, "measuring"):
        report_folder.claim(report, rules)
        same = report_folder.nameless(rules)
        results = known(subjects, same)
        write_report(report, subjects, results, skipped, rules)
        for name in [name for name in names if name not in skipped]:
            if name not in results:
                results[name] = [measure(name, subject, references, evaluation, same) for subject in subjects]
                write_report(report, subjects, results, skipped, rules)
            terminal.result(*as_lines([subject.name for subject in subjects], name, results[name]), "")
        for name, reason in skipped.items():
            terminal.note(f"not measured: {name} ({reason})")
        terminal.result(report / PAGE)


def _candidate(path: str | None, runtime: Runtime, dtype: Precision | None, **options: Any) -> Candidate:
    """A model with its adapters, words and VAE, by the chosen runtime and by torch in float32."""
    from latentdiff.evaluation.evaluate import Candidate

    def opened(runtime: Runtime, dtype: Precision | None) -> Painter:
        named = {name: options.get(name) for name in ("device", "variant", "revision")}
        pipe = loaded(path, dtype=dtype, runtime=runtime, **named)
        load_extras(pipe, options.get("loras", ()), options.get("words", ()), options.get("vae"))
        return pipe.painter

    return Candidate(path, partial(opened, runtime, dtype), partial(opened, Runtime.torch, Precision.float32))


def _drawing(options: dict[str, Any], settings: Sequence[str] | None) -> dict[str, Any]:
    """Settings of drawing, validated before anything is loaded. Raises ConfigError."""
    from latentdiff.drawing.request import request

    values = common_settings(options, settings or [])
    for name in OWN:
        if name in values:
            raise ConfigError(f"the evaluation chooses {name} itself")
    for name in LACKING:
        if name in values:
            raise ConfigError(f"{name} has no effect in an evaluation")
    request(prompt="checked before anything is loaded", seed=0, **values)
    return values


def _grid(options: Sequence[str], drawing: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """The grid of NAME=VALUE,VALUE, checked together with the settings of all drawing. Raises ConfigError."""
    from latentdiff.evaluation.sweep import GRID, combinations

    grid = grid_of(options, "--sweep") or dict(GRID)
    for combination in combinations(grid):
        _drawing(drawing | combination, [])
    return grid


def _names(only: str | None) -> list[str]:
    from latentdiff.evaluation.report.report import SECTIONS
    from latentdiff.settings.validation import did_you_mean

    names = [name.strip() for name in only.split(",")] if only is not None else list(SECTIONS)
    for name in names:
        if name not in SECTIONS:
            raise ConfigError(
                f"unknown section {name[:40]!r}{did_you_mean(name, SECTIONS)}; one of {', '.join(SECTIONS)}"
            )
    return [name for name in SECTIONS if name in names]
