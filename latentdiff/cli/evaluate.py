"""`latentdiff evaluate`: how good a model is, in one report."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentdiff.cli import report_folder
from latentdiff.cli.loading import adapter_and_weight, common_settings, load_extras, loaded, named
from latentdiff.cli.options import Precision, Runtime
from latentdiff.core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from latentdiff.data.examples import Examples
    from latentdiff.evaluation.features import Extractor
    from latentdiff.evaluation.sections import Against, Asked
    from latentdiff.pipeline import LatentDiffusionPipeline
    from latentdiff.settings.config import Config

LEAST = 16  # pictures
MOST = 1000  # settings of a sweep
OWN = ("seed", "num_images", "width", "height", "prompt_weights", "hires_scale", "hires_strength")
LACKING = ("autoguidance_scale", "strength")
Overrides = list[tuple[str, Any]]


def evaluate(
    model: Annotated[
        str | None, typer.Argument(help="A folder, a .safetensors file or a hub id (default: scenes-64).")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", help="Captioned pictures: a folder, .parquet, .tar, or a run's config.toml (default: scenes)."
        ),
    ] = None,
    report: Annotated[Path, typer.Option("--report", "-o", help="The folder for report.html and metrics.json.")] = Path(
        "report"
    ),
    compare: Annotated[str | None, typer.Option(help="Another model, measured beside it on the same draws.")] = None,
    only: Annotated[
        str | None,
        typer.Option(
            help="Some of likelihood, distances, composition, autoencoder, diversity, memorisation, sweep, geneval;"
            " commas between (default: all that can be)."
        ),
    ] = None,
    pictures: Annotated[
        int,
        typer.Option(
            min=16, max=50_000, help="To measure by; a quarter for the likelihood, a tenth for each category, ..."
        ),
    ] = 1000,
    times: Annotated[int, typer.Option(min=1, max=1000, help="Drawn times a picture, for the likelihood.")] = 8,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="Of pictures, noise and times.")] = 0,
    steps: Annotated[int | None, typer.Option("--steps", help="Sampling steps (default: the model's).")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option("--guidance-scale", "--cfg", help="Classifier-free guidance; 1 is none.")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="(default: the model's).")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting of drawing, NAME=VALUE; again for more.")
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            help="What the sweep tries, NAME=VALUE,VALUE; again for more (default: guidance, steps, samplers)."
        ),
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option(
            help="What compares pictures: CLIP in open_clip's format, a model that has one, or FID's Inception as"
            " .safetensors (default: the model's own CLIP, or scenes-64's)."
        ),
    ] = None,
    lpips: Annotated[Path | None, typer.Option(help="Weights of LPIPS as .safetensors, for the autoencoder.")] = None,
    training: Annotated[
        str | None, typer.Option(help="Pictures that the model was trained on, to look for copies of them.")
    ] = None,
    geneval: Annotated[
        Path | None, typer.Option(help="GenEval's evaluation_metadata.jsonl: draw its prompts for its evaluator.")
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out pictures that cannot be used.")] = False,
    allow_missing_captions: Annotated[
        bool, typer.Option("--allow-missing-captions", help="Pictures without a caption have the empty one.")
    ] = False,
    lora: Annotated[list[str] | None, typer.Option(help="An adapter and its weight, PATH:0.8; again for more.")] = None,
    embedding: Annotated[list[Path] | None, typer.Option(help="Learnt words; again for more.")] = None,
    vae: Annotated[Path | None, typer.Option(help="Another VAE of the same latents.")] = None,
    revision: Annotated[str | None, typer.Option(help="Of a hub id: commit, tag or branch.")] = None,
    variant: Annotated[str | None, typer.Option(help="Of a folder's weights: fp16, ...")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... (default: cuda where there is one).")] = None,
    dtype: Annotated[Precision | None, typer.Option(help="Of drawing (default: the runtime's).")] = None,
    runtime: Annotated[
        Runtime, typer.Option(help="Of drawing. auto: OpenVINO on a CPU where the model is exported.")
    ] = Runtime.auto,
) -> None:
    """Measure a model: likelihood, distances, composition, autoencoder, diversity, copies, settings.

    The same command goes on after an interruption. Figures go to standard output, progress to standard error.
    """
    from latentdiff.evaluation.report.report import PAGE, as_lines, known, lacking, measure, write_report
    from latentdiff.evaluation.sections import Asked, Subject
    from latentdiff.training.lock import locked

    drawing = _drawing({"num_inference_steps": steps, "guidance_scale": guidance_scale, "sampler": sampler}, settings)
    names = _names(only)
    grid = _grid(sweep or [], drawing if "sweep" in names else {})
    report_folder.check(report, data)
    adapters = [adapter_and_weight(each) for each in lora or []]
    models = [_Model(named(model), device, dtype, runtime, variant, revision, adapters, embedding or [], vae)]
    if compare is not None:
        models.append(_Model(named(compare), device, dtype, runtime))
    lenient = {"data.pictures.skip_bad": skip_bad, "data.pictures.allow_missing_captions": allow_missing_captions}
    given = [(name, True) for name, wanted in lenient.items() if wanted]
    against, config = _against(models[0], report, data, given, pictures, training, features, lpips, geneval)
    asked = Asked(seed, times, drawing | _sized(models), grid)
    subjects = [
        Subject(name, each.pipe, each.exact, report / letter)
        for each, name, letter in zip(models, _titles(models), "AB", strict=False)
    ]
    rules = _rules(models, config, against, asked)
    why = {name: [lacking(name, subject, against) for subject in subjects] for name in names}
    skipped = {name: next(reason for reason in reasons if reason) for name, reasons in why.items() if any(reasons)}
    if only is not None and skipped:
        name, reason = next(iter(skipped.items()))
        raise ConfigError(f"{name} cannot be measured: {reason}")
    with locked(report, "measuring"):
        report_folder.claim(report, rules)
        same = report_folder.nameless(rules)
        found = known(subjects, same)
        write_report(report, subjects, found, skipped, rules)
        for name in [name for name in names if name not in skipped]:
            if name not in found:
                found[name] = [measure(name, subject, against, asked, same) for subject in subjects]
                write_report(report, subjects, found, skipped, rules)
            typer.echo(as_lines([subject.name for subject in subjects], name, found[name]) + "\n")
        for name, reason in skipped.items():
            typer.echo(f"not measured: {name} ({reason})", err=True)
        typer.echo(report / PAGE)


@dataclass(frozen=True)
class _Model:
    """One that is measured: how it is loaded, and what is used beside it."""

    path: str | None
    device: str | None
    dtype: Precision | None
    runtime: Runtime
    variant: str | None = None
    revision: str | None = None
    loras: Sequence[tuple[Path, float]] = ()
    words: Sequence[Path] = ()
    vae: Path | None = None

    @cached_property
    def pipe(self) -> LatentDiffusionPipeline:
        """What draws."""
        return self._loaded(self.runtime, self.dtype)

    def exact(self) -> LatentDiffusionPipeline:
        """Torch's in float32, for what is no drawing."""
        return self._exact

    @cached_property
    def _exact(self) -> LatentDiffusionPipeline:
        import torch

        plain = self.pipe.runtime == "torch" and self.pipe.unet.dtype == torch.float32
        return self.pipe if plain else self._loaded(Runtime.torch, Precision.float32)

    def _loaded(self, runtime: Runtime, dtype: Precision | None) -> LatentDiffusionPipeline:
        pipe = loaded(self.path, self.device, dtype, self.variant, self.revision, runtime)
        load_extras(pipe, self.loras, self.words, self.vae)
        return pipe


def _sized(models: Sequence[_Model]) -> dict[str, int]:
    """Pictures are drawn as large as those that they are compared with: squares of the first model's size."""
    side = models[0].pipe.card.size[0]
    own = {model.pipe.card.size for model in models}
    return {} if own == {(side, side)} else {"height": side, "width": side}


def _titles(models: Sequence[_Model]) -> list[str]:
    """Their names; of one name by where they lie too, or by a letter."""
    names = [model.pipe.card.name for model in models]
    if len(set(names)) < len(names):
        places = [Path(model.path or "").name for model in models]
        told = places if len(set(places)) == len(places) else "AB"
        names = [f"{name} ({place or 'the default'})" for name, place in zip(names, told, strict=False)]
    return names


def _drawing(given: dict[str, Any], settings: Sequence[str] | None) -> dict[str, Any]:
    """Settings of drawing, validated before anything is loaded. Raises ConfigError."""
    from latentdiff.drawing.request import request

    found = common_settings(given, settings or [])
    del found["num_images"]
    for name in OWN:
        if name in found:
            raise ConfigError(f"{name} is the evaluation's own, and no setting of drawing")
    for name in LACKING:
        if name in found:
            raise ConfigError(f"{name} needs what an evaluation does not have")
    request(prompt="checked before anything is loaded", seed=0, **found)
    return found


def _grid(wanted: Sequence[str], drawing: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """NAME=VALUE,VALUE, each as `--set` takes one, on top of the settings of all drawing. Raises ConfigError."""
    from latentdiff.evaluation.sweep import GRID, combinations

    grid: dict[str, tuple[Any, ...]] = {}
    for text in wanted:
        name, equals, values = text.partition("=")
        if not equals or not values or name in grid:
            raise ConfigError(f"--sweep is NAME=VALUE,VALUE, once a name (got {text[:60]!r})")
        given = [_setting(name, value) for value in re.split(r",(?![^\[]*\])", values)]  # not within brackets
        grid[next(iter(given[0]))] = tuple(next(iter(one.values())) for one in given)
    grid = grid or dict(GRID)
    if (count := math.prod(map(len, grid.values()))) > MOST:
        raise ConfigError(f"a sweep of {count:,} settings. At most {MOST:,} are tried")
    for combination in combinations(grid):
        _drawing(drawing | combination, [])
    return grid


def _setting(name: str, value: str) -> dict[str, Any]:
    """One setting by itself, which may mean something only beside others."""
    found = common_settings({}, [f"{name}={value}"])
    del found["num_images"]
    return found


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


def _against(
    model: _Model,
    report: Path,
    data: str | None,
    given: Overrides,
    count: int,
    training: str | None,
    features: Path | None,
    lpips: Path | None,
    geneval: Path | None,
) -> tuple[Against, dict[str, Any]]:
    """What models are measured by, and what is to be known of it."""
    from latentdiff.core.files import sha256_of
    from latentdiff.data.dataset import look
    from latentdiff.evaluation.geneval import read_prompts
    from latentdiff.evaluation.held_out import held_out, shown
    from latentdiff.evaluation.sections import Against
    from latentdiff.networks.perception import load_lpips

    prompts = read_prompts(geneval) if geneval else []
    distance = load_lpips(lpips) if lpips else None
    side = model.pipe.card.size[0]
    config = _config(data, side, given)
    found = None if config.data.kind == "scenes" else look(config).sound(config.data.pictures.skip_bad)
    held, trained = held_out(config, count, found)
    if len(held) < LEAST:
        raise DataError(f"{len(held)} different pictures are too few to measure by. At least {LEAST} are needed")
    if training is not None:
        trained = held_out(_config(training, side, given), 50_000)[0]
    extractor = _extractor(model, features)
    if extractor.scorer is not None:
        extractor.scorer.to(model.pipe.device)
    against = Against(
        partial(shown, held, report),
        extractor,
        extractor.scorer,
        partial(shown, trained, report) if trained else None,
        distance,
        prompts,
        scenes=config.data.kind == "scenes",
    )
    said = {"data": "scenes" if data is None else data, "pictures": len(held), "data sha256": _identity(config, held)}
    if found and found.left_out:
        said["left out"] = len(found.quarantined) + len(found.listing.orphans)
        typer.echo(f"left out: {said['left out']} that cannot be used (`latentdiff data` lists them)", err=True)
    if trained:
        said |= {"training pictures": len(trained), "training sha256": trained.pictures.identity()}
    said |= {f"{name} sha256": sha256_of(file) for name, file in (("lpips", lpips), ("geneval", geneval)) if file}
    return against, said


def _identity(config: Config, held: Examples) -> str:
    """sha256 of the pictures, their captions, and all settings by which they are shown."""
    shown = config.data.model_dump(mode="json", exclude={"pictures": {"source"}})
    said = json.dumps([held.pictures.identity(), config.image_size, shown], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def _config(data: str | None, side: int, given: Overrides) -> Config:
    """Of a run's config, of pictures, or of the scenes of the default config, at the model's size."""
    from latentdiff.settings.config import load_config, own_pictures

    given = [*given, ("image_size", side)]
    if data is not None and data.endswith(".toml") and not Path(data).is_dir():
        return load_config(Path(data), given)
    return load_config(None, [*(own_pictures(data) if data is not None else ()), *given])


def _extractor(model: _Model, features: Path | None) -> Extractor:
    """As it is named, or the model's own CLIP, or the default model's."""
    from latentdiff.evaluation import features as extractors
    from latentdiff.families.pretrained import default_model

    if features is not None:
        return extractors.named(features)
    folder, name = model.pipe.card.folder, model.pipe.card.name
    if folder and (folder / "clip").is_dir():
        return extractors.of_model(folder, name=f"the CLIP of {name}")
    typer.echo(f"features: {name} has no CLIP, so the default model's is taken, which knows scenes alone", err=True)
    return extractors.of_model(default_model(), name="the CLIP of the default model")


def _rules(models: Sequence[_Model], data: dict[str, Any], against: Against, asked: Asked) -> dict[str, Any]:
    """All that figures depend on, as JSON gives it back."""
    from latentdiff.drawing.record import installed_versions

    pipes = [model.pipe for model in models]
    found = {
        "models": [pipe.card.source or pipe.card.name for pipe in pipes],
        "model sha256": [pipe.card.hash for pipe in pipes],
        "model settings sha256": [_settings_hash(pipe.card.folder) for pipe in pipes],
        "beside": [[asdict(source) for source in pipe.extras.sources.values()] for pipe in pipes],
        **data,
        "features": against.extractor.name,
        "features sha256": against.extractor.hash,
        "seed": asked.seed,
        "times": asked.times,
        "drawing": [{**pipe.card.defaults, **asked.settings} for pipe in pipes],
        "sweep": asked.grid,
        "runtime": [f"{pipe.runtime}, {pipe.unet.dtype}" for pipe in pipes],
        "device": str(pipes[0].device),
        "versions": installed_versions(pipes[0].runtime) | installed_versions(),
    }
    return dict(json.loads(json.dumps(found)))


def _settings_hash(folder: Path | None) -> str | None:
    from latentdiff.formats.folder import settings_hash

    return settings_hash(folder) if folder and folder.is_dir() else None
