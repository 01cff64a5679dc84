"""The sections of a report: each measures one property of a model, with the same references for every model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from latentdiff.core.errors import NonFiniteError
from latentdiff.core.images import coloured, luminance, to_images
from latentdiff.diffusion.bound import bits
from latentdiff.drawing.painter import Painter
from latentdiff.evaluation import autoencoder as compressing
from latentdiff.evaluation import geneval, recognition
from latentdiff.evaluation.benchmark import Benchmark, SpriteBenchmark
from latentdiff.evaluation.composition import PICTURES_A_PROMPT, ceiling, evaluate_composition
from latentdiff.evaluation.distances import distances, frechet, nearest, vendi
from latentdiff.evaluation.features import AT_ONCE, Extractor
from latentdiff.evaluation.jackknife import jackknife
from latentdiff.evaluation.likelihood import Likelihood, likelihood
from latentdiff.evaluation.pictures import draw_pictures, reconstructed
from latentdiff.evaluation.report.plots import Plot, Series
from latentdiff.evaluation.result import Figure, Result, Table, mean

if TYPE_CHECKING:
    from torch import Tensor

    from latentdiff.networks.scorer import Scorer

SHOWN = 12  # pictures of a section
CURVE_BINS = 25
Read = Callable[[], tuple[np.ndarray, list[str]]]
Labelled = tuple[np.ndarray, dict[str, str]]


@dataclass(frozen=True)
class Subject:
    """A model to measure. exact: its networks by torch in float32; folder: where its pictures are stored."""

    name: str
    painter: Painter
    exact: Callable[[], Painter]
    folder: Path


@dataclass(frozen=True)
class References:
    """The references: captioned pictures that the model was not trained on, and networks.

    held: the held-out pictures and their captions; training: others. scorer: CLIP, for the
    agreement of pictures and captions. benchmark: scenes whose pictures can be read, for the composition. has_seen:
    whether the model was trained on `training`; otherwise they are other pictures of the same kind.
    """

    held: Read
    extractor: Extractor
    scorer: Scorer | None = None
    training: Read | None = None
    lpips: Callable[[Tensor, Tensor], Any] | None = None
    prompts: Sequence[dict[str, Any]] = ()
    benchmark: Benchmark | None = None
    has_seen: bool = True

    @cached_property
    def _held(self) -> tuple[np.ndarray, list[str]]:
        return self.held()

    @property
    def pictures(self) -> np.ndarray:
        """uint8 (N, H, W, 3)."""
        return self._held[0]

    @cached_property
    def features(self) -> np.ndarray:
        """The features of the held-out pictures, (N, E), which several sections use."""
        return self.extractor.of_known(self.pictures)

    @cached_property
    def trained(self) -> np.ndarray:
        """Training pictures, uint8 (M, H, W, 3)."""
        assert self.training is not None
        return self.training()[0]

    @cached_property
    def floor(self) -> dict[str, Figure]:
        """The distances between two sets of real pictures, one of them from training; empty if there are too few."""
        count = len(self.pictures)
        if self.training is None or len(self.trained) < count:
            return {}
        trained = self.extractor.of_known(self.trained[:count])
        figures = distances(trained, self.features, unit=self.extractor.scorer is not None)
        return {f"{name}_floor": replace(figure, better="neither") for name, figure in figures.items()}

    @property
    def captions(self) -> list[str]:
        """One caption of each picture."""
        return self._held[1]


@dataclass(frozen=True)
class EvaluationSettings:
    """The settings of an evaluation: the number of pictures and times, the seed, the settings of drawing."""

    seed: int = 0
    times: int = 8
    drawing: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, tuple[Any, ...]] = field(default_factory=dict)


def of_likelihood(subject: Subject, references: References, settings: EvaluationSettings) -> Result:
    """The bits per dimension of a quarter of the pictures."""
    count = min(len(references.pictures), max(16, len(references.pictures) // 4))
    pictures, captions, folder = references.pictures[:count], references.captions[:count], subject.folder / "likelihood"
    result = likelihood(
        subject.exact().model, pictures, captions, times=settings.times, seed=settings.seed, folder=folder
    )
    figures = {}
    for variance in ("small", "large"):
        suffix = "" if variance == "small" else "_large_variance"
        for name, errors in (("with_captions", result.cond), ("without_captions", result.uncond)):
            figures[f"bits_per_dimension_{name}{suffix}"] = mean(result.bits(errors, variance), "lower", paired=True)
        figures[f"gain_by_captions{suffix}"] = mean(result.gain(variance), "higher", paired=True)
    facts = {"pictures": count, "times": settings.times, "arithmetic": "torch in float32"}
    facts |= {"dimensions": result.dimensions, "latent dimensions": result.cond.dimensions}
    return Result(figures | _terms(result), facts, [_curve(result, subject.exact().model.path.T)])


def _terms(result: Likelihood) -> dict[str, Figure]:
    """The terms of the bound with captions, in bits per dimension of a picture."""
    terms = {
        "term_prior": result.cond.prior,
        "term_denoising": result.cond.denoising(),
        "term_denoising_without_captions": result.uncond.denoising(),
        "term_reconstruction": result.cond.reconstruction,
        "term_decoder": result.decoder,
        "term_posterior": -result.entropy,
    }
    figures = {name: mean(bits(nats, result.dimensions)) for name, nats in terms.items()}
    per_latent = mean(bits(result.cond.total(), result.cond.dimensions))
    return figures | {"latents_bits_per_latent_dimension": per_latent}


def _curve(result: Likelihood, timesteps: int) -> Plot:
    edges = np.unique(np.linspace(1, timesteps, CURVE_BINS + 1).astype(int)).tolist()
    middles = [(low + high) / 2 for low, high in pairwise(edges)]
    series = [
        Series(name, middles, bits(errors.curve(edges), result.dimensions).tolist())
        for name, errors in (("with captions", result.cond), ("without", result.uncond))
    ]
    return Plot("the denoising term at each time", "t", "bits per dimension", series, log="y")


def of_distances(subject: Subject, references: References, settings: EvaluationSettings) -> Result:
    """The distances of drawn pictures, one for every caption, from the captions' real pictures."""
    folder = subject.folder / "drawn"
    images = draw_pictures(subject.painter, references.captions, seed=settings.seed, folder=folder, **settings.drawing)
    figures = all_distances(images, references) | references.floor
    pictures: list[Labelled] = []
    for row in range(min(SHOWN, len(images))):
        pictures.append((images[row], {"drawn": references.captions[row]}))
        pictures.append((references.pictures[row], {"real": references.captions[row]}))
    return Result(figures, {"pictures": len(images), **_extractor(references)}, pictures=pictures)


def all_distances(images: np.ndarray, references: References) -> dict[str, Figure]:
    """Every distance of drawn pictures from the real ones; validations during training use it too."""
    extractor = references.extractor
    figures = distances(extractor.of(images), references.features, unit=extractor.scorer is not None)
    if references.scorer is not None:
        figures["clip_score"] = mean(clip_scores(references.scorer, references.captions, images), "higher", paired=True)
        figures["clip_score_of_real"] = mean(clip_scores(references.scorer, references.captions, references.pictures))
    return figures


def clip_scores(scorer: Scorer, captions: Sequence[str], pictures: np.ndarray) -> np.ndarray:
    """100 max(cosine, 0) (Hessel et al. 2021, eq. 1, with w = 100), (N,)."""
    scores = []
    for first in range(0, len(pictures), AT_ONCE):
        images = to_images(coloured(pictures[first : first + AT_ONCE])).to(scorer.mean.device)
        scores.append(scorer.score(captions[first : first + AT_ONCE], images).cpu().numpy())
    cosines = np.concatenate(scores)
    if not np.isfinite(cosines).all():
        raise NonFiniteError("CLIP's scores are not finite. Its weights may be damaged")
    return np.asarray(100 * cosines.clip(0, None))


def of_composition(subject: Subject, references: References, settings: EvaluationSettings) -> Result:
    """GenEval's six categories as the benchmark reads them, a tenth of the pictures a category."""
    count = max(1, len(references.pictures) // 10 // PICTURES_A_PROMPT) * PICTURES_A_PROMPT
    kept: dict[str, Any] = {"folder": subject.folder / "composition", **settings.drawing}
    benchmark = references.benchmark
    assert benchmark is not None
    score = partial(evaluate_composition, subject.painter, benchmark, pictures=count, seed=settings.seed, **kept)
    scores = {"": score(), "held_out": score(held_out=True)}
    scores["ceiling"] = ceiling(subject.exact().model, benchmark, pictures=count, seed=settings.seed)
    figures: dict[str, Figure] = {}
    for title, outcome in scores.items():
        suffix = f"_{title}" if title else ""
        every = [right for share in outcome.categories.values() for right in share.each]
        figures[f"composition{suffix}"] = _share(outcome.overall, outcome.error, every)
        for name, share in outcome.categories.items():
            figures[f"{name}{suffix}"] = _share(share.mean, share.error, share.each)
    pictures = [
        (row, {"right" if right else "wrong": f"{name}: {caption}"})
        for name, rows in scores[""].pictures.items()
        for row, caption, right in zip(rows[:2], scores[""].captions[name], scores[""].right[name], strict=False)
    ]
    return Result(figures, {"pictures a category": count, "reader": benchmark.reader}, pictures=pictures)


def of_recognition(subject: Subject, references: References, settings: EvaluationSettings) -> Result:
    """The share of pictures of one thing each whose name the judge finds, beside the things' own pictures."""
    benchmark, count = references.benchmark, len(references.pictures)
    assert isinstance(benchmark, SpriteBenchmark)
    library, folder = benchmark.library, subject.folder / "recognition"
    held = [library.sprites[row] for row in sorted(library.held_out)][: max(1, count // 5)]
    figures: dict[str, Figure] = {}
    outcomes = {}
    for suffix, sprites in (("", recognition.chosen(library, count, settings.seed)), ("_held_out", held)):
        if not sprites:
            continue
        place = folder / ("things" + suffix.replace("_", "-"))
        result = recognition.draw_and_name(
            subject.painter, benchmark, sprites, settings.seed, place, **settings.drawing
        )
        outcomes[suffix] = result
        own = recognition.own_pictures(benchmark, sprites, settings.seed)
        decoded = reconstructed(subject.exact().model, own)
        for among in (1, recognition.MOST_LIKELY):
            figures[f"recognised_{among}{suffix}"] = mean(result.right(among), "higher", paired=True)
            for title, pictures in (("rendered", own), ("decoded", decoded)):
                right = replace(result, names=recognition.named(benchmark.judge, pictures)).right(among)
                figures[f"recognised_{among}_{title}{suffix}"] = mean(right, "neither")
        if suffix:
            ratios = recognition.style_distances(benchmark, result, settings.seed)
            figures[f"style_distance{suffix}"] = mean(ratios, "lower", paired=True)
    first = outcomes[""]
    examples = [
        (picture, {prompt: ", ".join(names[:2])})
        for picture, prompt, names in zip(first.pictures[:100], first.prompts, first.names, strict=False)
    ]
    facts = {"things": len(first.sprites), "held-out pairs": len(held), "judge": benchmark.judge.architecture}
    return Result(figures, facts, pictures=examples)


def _share(value: float, error: float, each: Sequence[float]) -> Figure:
    return Figure(value, error if np.isfinite(error) else None, "higher", tuple(each))


def of_autoencoder(subject: Subject, references: References, settings: EvaluationSettings) -> Result:
    """The error of encoding and decoding the pictures, by torch in float32."""
    real = references.pictures
    result = compressing.decoded(subject.exact().model, real, subject.folder)
    in_colour = result.pictures.shape[-1] == 3
    originals = real if in_colour else luminance(real)
    features = references.features if in_colour else references.extractor.of_known(originals)
    psnr = compressing.psnr(originals, result.pictures)
    figures = {
        "psnr": mean(psnr, "higher", paired=True),
        "reconstruction_frechet": jackknife(
            frechet, references.extractor.of(result.pictures), features, better="lower"
        ),
        "latent_mean": Figure(float(np.abs(result.mean).max())),
        "latent_std_least": Figure(float(result.std.min())),
        "latent_std_most": Figure(float(result.std.max())),
    }
    if min(real.shape[1:3]) >= compressing.SMALLEST:
        figures["ssim"] = mean(compressing.ssim(originals, result.pictures), "higher", paired=True)
    if references.lpips is not None:
        figures["lpips"] = mean(
            compressing.perceptual(references.lpips, originals, result.pictures), "lower", paired=True
        )
    pictures: list[Labelled] = []
    for row in np.argsort(psnr)[: SHOWN // 2]:
        label = {"decoded": f"{psnr[row]:.1f} dB, one of the worst"}
        pictures += [(originals[row], {"original": ""}), (result.pictures[row], label)]
    channels = [f"{m:+.3f} / {s:.3f}" for m, s in zip(result.mean, result.std, strict=True)]
    table = Table("latents", ["channel", "mean / std"], [[str(n), label] for n, label in enumerate(channels)])
    return Result(figures, {"pictures": len(real), **_extractor(references)}, tables=[table], pictures=pictures)


def of_diversity(subject: Subject, references: References, settings: EvaluationSettings) -> Result:
    """The diversity of four pictures of a prompt, for a twentieth of the captions."""
    count = max(4, len(references.captions) // 20)
    prompts = [caption for caption in references.captions[:count] for _ in range(PICTURES_A_PROMPT)]
    folder = subject.folder / "diversity"
    images = draw_pictures(
        subject.painter, prompts, seed=settings.seed, folder=folder, title="diversity", **settings.drawing
    )
    features = references.extractor.of(images)
    units = features / np.linalg.norm(features, axis=1, keepdims=True)
    groups = units.reshape(-1, PICTURES_A_PROMPT, units.shape[-1])
    upper = np.triu_indices(PICTURES_A_PROMPT, 1)
    apart = [float((1 - group @ group.T)[upper].mean()) for group in groups]
    figures = {
        "distance_within_a_prompt": mean(apart),
        "distance_between_prompts": jackknife(_between, units[::PICTURES_A_PROMPT]),
        "vendi": jackknife(vendi, features[::PICTURES_A_PROMPT]),
        "vendi_of_real": jackknife(vendi, references.features[:count]),
    }
    order = np.argsort(apart)
    chosen = [*order[:2], *order[-2:]]
    rows = images.reshape(-1, PICTURES_A_PROMPT, *images.shape[1:])
    pictures = [
        (np.concatenate(list(rows[row]), 1), {f"{apart[row]:.3f}": prompts[PICTURES_A_PROMPT * row]}) for row in chosen
    ]
    facts = {"prompts": count, "pictures a prompt": PICTURES_A_PROMPT, **_extractor(references)}
    return Result(figures, facts, pictures=pictures)


def _between(units: np.ndarray) -> float:
    upper = np.triu_indices(len(units), 1)
    return float((1 - units @ units.T)[upper].mean())


def of_memorisation(subject: Subject, references: References, settings: EvaluationSettings) -> Result:
    """The nearest training picture of every drawn one, compared with those of held-out pictures.

    A copy would be nearer than held-out pictures are. The k nearest of N held-out pictures, a hundredth of them, define
    what is very near: an independent picture is nearer than the k-th with probability k / (N + 1). For a held-out
    picture that was trained on after all, the nearest other one counts.
    """
    folder = subject.folder / "drawn"
    images = draw_pictures(subject.painter, references.captions, seed=settings.seed, folder=folder, **settings.drawing)
    trained = references.trained
    training = references.extractor.of_known(trained)
    where, near = nearest(references.extractor.of(images), training)
    _, real = nearest(references.features, training, but=(_digests(references.pictures), _digests(trained)))
    figures = {
        "cosine_to_nearest_training_picture": mean(near),
        "cosine_of_held_out_pictures": mean(real),
        "share_nearer_than_99_of_100_held_out": jackknife(_share_nearer, near, real),
        "share_by_chance": Figure(_hundredth(len(real)) / (len(real) + 1)),
    }
    pictures: list[Labelled] = []
    for row in np.argsort(-near)[: SHOWN // 2]:
        pictures.append((images[row], {f"drawn, {near[row]:.4f}": references.captions[row]}))
        pictures.append((trained[where[row]], {"trained on": ""}))
    facts = {"pictures": len(images), "training pictures": len(training), **_extractor(references)}
    return Result(figures, facts, pictures=pictures)


def _hundredth(count: int) -> int:
    return max(1, round(count / 100))


def _share_nearer(near: np.ndarray, real: np.ndarray) -> float:
    """The share of drawn pictures that are nearer than all but the k nearest held-out ones."""
    return float((near > np.sort(real)[-_hundredth(len(real))]).mean())


def _digests(pictures: np.ndarray) -> np.ndarray:
    """Hashes that identify pictures, (N,)."""
    return np.array([hashlib.sha256(picture.tobytes()).hexdigest() for picture in pictures])


def of_geneval(subject: Subject, references: References, settings: EvaluationSettings) -> Result:
    """GenEval's own prompts, for its evaluator; nothing is scored here."""
    folder = subject.folder / "geneval"
    grids = geneval.draw_geneval(subject.painter, references.prompts, folder, seed=settings.seed, **settings.drawing)
    numbered = enumerate(zip(grids, references.prompts, strict=True))
    pictures = [(grid, {"": row["prompt"]}) for number, (grid, row) in numbered if number < SHOWN]
    facts = {
        "prompts": len(references.prompts),
        "pictures a prompt": geneval.PICTURES,
        "layout": "NNNNN/samples/NNNN.png",
    }
    return Result({}, facts, pictures=pictures)


def _extractor(references: References) -> dict[str, str]:
    return {"features": references.extractor.name, "features sha256": references.extractor.hash}
