"""The parts of an evaluation: models, references, and everything that figures depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from latentdiff.core.errors import DataError
from latentdiff.core.files import sha256_of
from latentdiff.data.dataset import survey_of
from latentdiff.data.examples import Examples
from latentdiff.data.sprites.library import Library
from latentdiff.drawing.painter import Painter
from latentdiff.drawing.presets import settled_for
from latentdiff.drawing.record import installed_versions
from latentdiff.evaluation import features as extractors
from latentdiff.evaluation.benchmark import SHAPES, Benchmark, ComposedShapes, SpriteBenchmark, of_shapes
from latentdiff.evaluation.features import Extractor
from latentdiff.evaluation.geneval import read_prompts
from latentdiff.evaluation.held_out import held_out, pictures_of
from latentdiff.evaluation.judge import WEIGHTS, Judge
from latentdiff.evaluation.sections import EvaluationSettings, References
from latentdiff.families.loading import included_model
from latentdiff.formats.folder import settings_hash
from latentdiff.formats.tensors import read_tensors
from latentdiff.networks.perception import lpips
from latentdiff.settings.config import Config, load_config, own_pictures

LEAST = 16  # pictures
MOST_TRAINED = 50_000
Overrides = Sequence[tuple[str, Any]]
_SHAPES_ALONE: Overrides = (("data.kind", "sprites"), ("data.sprites.shapes", 1.0))
Say = Callable[[str], None]


@dataclass(frozen=True)
class Candidate:
    """A model to measure, opened when it is first needed.

    open: the painter that draws; open_exact: the same model by torch in float32, for all other measurements.
    """

    path: str | None
    open: Callable[[], Painter]
    open_exact: Callable[[], Painter]

    @cached_property
    def painter(self) -> Painter:
        """The painter that draws."""
        return self.open()

    def exact(self) -> Painter:
        """The painter of `open_exact`, or the drawing one if it already computes by torch in float32."""
        return self._exact

    @cached_property
    def _exact(self) -> Painter:
        model = self.painter.model
        return self.painter if (model.runtime, model.dtype) == ("torch", "float32") else self.open_exact()


@dataclass(frozen=True)
class Sources:
    """The sources of an evaluation's references; None is the default of each.

    data: captioned pictures, or the config of a run. training: pictures that the model was trained on. features, lpips,
    geneval, judge: files and folders. lenient: settings that leave out unusable pictures.
    """

    data: str | None = None
    training: str | None = None
    features: Path | None = None
    lpips: Path | None = None
    geneval: Path | None = None
    judge: Path | None = None
    lenient: Overrides = ()


def sized(candidates: Sequence[Candidate]) -> dict[str, int]:
    """The settings that draw squares of the first model's side, like the references; none if all models do anyway."""
    side = candidates[0].painter.model.card.size[0]
    own = {candidate.painter.model.card.size for candidate in candidates}
    return {} if own == {(side, side)} else {"height": side, "width": side}


def titles(candidates: Sequence[Candidate]) -> list[str]:
    """The candidates' names; equal names are distinguished by the models' places, or by letters."""
    names = [
        " + ".join([each.painter.model.card.name, *(Path(s.path).stem for s in each.painter.sources.values())])
        for each in candidates
    ]
    if len(set(names)) < len(names):
        places = [Path(candidate.path or "").name for candidate in candidates]
        marks = places if len(set(places)) == len(places) else "AB"
        names = [f"{name} ({place or 'the default'})" for name, place in zip(names, marks, strict=False)]
    return names


def references_of(
    candidate: Candidate, sources: Sources, count: int, report: Path, say: Say
) -> tuple[References, dict[str, Any]]:
    """The references of an evaluation, and their identity. report: a folder for large arrays. Raises DataError."""
    prompts = read_prompts(sources.geneval) if sources.geneval else []
    distance = lpips(read_tensors(sources.lpips), sources.lpips) if sources.lpips else None
    model = candidate.painter.model
    side = model.card.size[0]
    composed = sources.data is None and isinstance(of_shapes(model.card), ComposedShapes)
    config = _config(sources.data, side, [*(_SHAPES_ALONE if composed else ()), *sources.lenient])
    survey = None if config.data.is_procedural else survey_of(config).accepted(config.data.pictures.skip_bad)
    for note in survey.listing.notes if survey else ():
        say(f"data: {note}")
    held, trained = held_out(config, count, survey)
    if len(held) < LEAST:
        raise DataError(f"{len(held)} different pictures are too few: an evaluation requires at least {LEAST}")
    if sources.training is not None:
        trained = held_out(_config(sources.training, side, sources.lenient), MOST_TRAINED)[0]
    extractor = _extractor(candidate, sources.features, say)
    if extractor.scorer is not None:
        extractor.scorer.to(model.place.device)
    references = References(
        partial(pictures_of, held, report),
        extractor,
        extractor.scorer,
        partial(pictures_of, trained, report) if trained else None,
        distance,
        prompts,
        _benchmark(config, sources.judge),
        has_seen=not composed or sources.training is not None,
    )
    name = "scenes" if sources.data is None else sources.data
    identity = {"data": name, "pictures": len(held), "data sha256": _identity(config, held)}
    if survey and survey.left_out:
        identity["left out"] = len(survey.quarantined) + len(survey.listing.orphans)
        say(f"left out: {identity['left out']} that cannot be used (`latentdiff data` lists them)")
    if trained:
        identity |= {"training pictures": len(trained), "training sha256": trained.pictures.identity()}
    judge = sources.judge and sources.judge / WEIGHTS
    files = (("lpips", sources.lpips), ("geneval", sources.geneval), ("judge", judge))
    return references, identity | {f"{name} sha256": sha256_of(file) for name, file in files if file}


def _benchmark(config: Config, judge: Path | None) -> Benchmark | None:
    """The benchmark of a config's scenes; None if their pictures cannot be read."""
    if config.data.kind == "scenes":
        return SHAPES
    settings = config.data.sprites
    if config.data.kind == "sprites" and not settings.source:
        return ComposedShapes(config.image_size)
    if config.data.kind == "sprites" and judge is not None:
        library = Library(Path(settings.source))
        return SpriteBenchmark(library, config.image_size, settings.shapes, Judge.load(judge))
    return None


def _identity(config: Config, held: Examples) -> str:
    """sha256 of the pictures, their captions, and all settings that affect their pixels."""
    settings = config.data.model_dump(mode="json", exclude={"pictures": {"source"}})
    tree = json.dumps([held.pictures.identity(), config.image_size, settings], sort_keys=True)
    return hashlib.sha256(tree.encode()).hexdigest()


def _config(data: str | None, side: int, lenient: Overrides) -> Config:
    """The config of the data, at the model's size: a run's, one of the user's pictures, or the default's scenes."""
    overrides = [*lenient, ("image_size", side)]
    if data is not None and data.endswith(".toml") and not Path(data).is_dir():
        return load_config(Path(data), overrides)
    return load_config(None, [*(own_pictures(data) if data is not None else ()), *overrides])


def _extractor(candidate: Candidate, features: Path | None, say: Say) -> Extractor:
    """The extractor that the user names, or the model's own CLIP, or that of scenes-64."""
    if features is not None:
        return extractors.named(features)
    card = candidate.painter.model.card
    if card.folder and (card.folder / "clip").is_dir():
        return extractors.of_model(card.folder, name=f"the CLIP of {card.name}")
    say(f"features: {card.name} has no CLIP; that of scenes-64 is used, which knows only scenes")
    return extractors.of_model(included_model("scenes-64"), name="the CLIP of scenes-64")


def rules_of(
    candidates: Sequence[Candidate], identity: dict[str, Any], references: References, settings: EvaluationSettings
) -> dict[str, Any]:
    """Everything that figures depend on, after a round trip through JSON."""
    painters = [candidate.painter for candidate in candidates]
    models = [painter.model for painter in painters]
    rules = {
        "models": [model.card.source or model.card.name for model in models],
        "model sha256": [model.card.hash for model in models],
        "model settings sha256": [_settings_hash(model.card.folder) for model in models],
        "beside": [[asdict(source) for source in painter.sources.values()] for painter in painters],
        **identity,
        "features": references.extractor.name,
        "features sha256": references.extractor.hash,
        "seed": settings.seed,
        "times": settings.times,
        "drawing": [settled_for(model, settings.drawing) for model in models],
        "sweep": settings.grid,
        "runtime": [f"{model.runtime}, {model.backbone.dtype}" for model in models],
        "device": str(models[0].place.device),
        "versions": installed_versions(models[0].runtime) | installed_versions(),
    }
    return dict(json.loads(json.dumps(rules)))


def _settings_hash(folder: Path | None) -> str | None:
    return settings_hash(folder) if folder and folder.is_dir() else None
