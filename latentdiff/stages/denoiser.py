"""Stage 3: the U-Net, and optionally the text encoder; completes `run/model`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from torch import nn

from latentdiff.core.errors import ConfigError, saving
from latentdiff.core.files import atomic
from latentdiff.core.images import as_picture, coloured
from latentdiff.core.vocabulary import seen_things
from latentdiff.data import scenes
from latentdiff.data.companions import companions
from latentdiff.data.dataset import DataSet, readable
from latentdiff.data.examples import Examples
from latentdiff.data.scene_set import Scenes
from latentdiff.diffusion.objective import DiffusionLoss
from latentdiff.diffusion.times import Times
from latentdiff.drawing.canvas import reduced, resized
from latentdiff.drawing.draw import draw_prompts
from latentdiff.drawing.painter import Painter
from latentdiff.evaluation.composition import evaluate_composition, evaluation_scenes
from latentdiff.evaluation.features import of_model
from latentdiff.evaluation.held_out import held_out, pictures_of
from latentdiff.evaluation.pictures import draw_pictures
from latentdiff.evaluation.sections import References, all_distances
from latentdiff.families.loading import save_model
from latentdiff.families.own import (
    laid_out_for,
    new_backbone,
    new_codec,
    new_enlarging,
    new_model,
    new_path,
    seeded,
    times_of,
)
from latentdiff.families.weights import load_codec, load_text_encoder, weights_hash
from latentdiff.model import TorchPlace
from latentdiff.networks.backbones.dit import DiT
from latentdiff.networks.backbones.transformer import Transformer
from latentdiff.networks.backbones.unet import UNet
from latentdiff.networks.encoders.class_labels import ClassLabels
from latentdiff.networks.encoders.clip import TextEncoder
from latentdiff.settings.config import Config, Learning
from latentdiff.stages.beside import Edited, Masked, Small
from latentdiff.stages.cache import captions_of, latents_of
from latentdiff.stages.classes import classes_of
from latentdiff.stages.encoding import AnyCodec
from latentdiff.stages.initial import load_weights
from latentdiff.stages.run import Run
from latentdiff.training.denoiser import (
    TIME_BINS,
    BesideNetwork,
    Captions,
    ConditionedNetwork,
    DenoiserStage,
    Draws,
    Samples,
    thaw,
    validation_losses,
)
from latentdiff.training.order import Order
from latentdiff.training.run import run_stage


def train_denoiser(run: Run[Config]) -> None:
    """Train the U-Net, and optionally the text encoder, on latents; completes `run/model`."""
    config, accelerator = run.config, run.accelerator
    codec, text_encoder = networks_before(config, run.folder, run.data.training)
    made_from = f"{weights_hash(codec)} {weights_hash(text_encoder)}"
    unet = _backbone(config, codec, text_encoder, accelerator)
    if config.denoiser.initial and run.checkpoints["denoiser"] is None:
        load_weights(config.denoiser.initial, unet)
    network: nn.Module = BesideNetwork(unet) if _reads_beside(config) else unet
    parts: dict[str, nn.Module] = {"unet": unet}
    if config.denoiser.tune_text_encoder and isinstance(text_encoder, TextEncoder):
        thaw(text_encoder, words=config.clip.merges is not None)
        if accelerator.device.type == "cpu":
            text_encoder.use_plain_attention()
        network, parts["text_encoder"] = ConditionedNetwork(unet, text_encoder), text_encoder
    before = _before(run)
    trained, validated = _samples(run, codec, text_encoder, before)
    loss, draws, order = _training(config, run.data.training, accelerator.num_processes)
    stage = DenoiserStage(network, parts, loss, trained, draws, order)
    loss, draws, order = _validation(config, run.data.validation)
    validation = DenoiserStage(network, parts, loss, validated, draws, order)
    model = new_model(config, codec, text_encoder, unet)
    references = _references(run) if config.denoiser.distance_pictures and accelerator.is_main_process else None
    report = partial(_report, run, Painter(model), validation, references, before[-1:])
    start = run.start("denoiser", made_from=made_from)
    settings = config.denoiser.training
    run_stage(accelerator, stage, settings, run.folder / "denoiser", report, start, run.interruption)
    if accelerator.is_main_process:
        with saving("the model", run.folder / "model"):
            pictures = run.data.training.pictures
            if isinstance(text_encoder, ClassLabels):  # which refuses what it does not know
                card = replace(model.card, things={"classes": text_encoder.names})
            else:
                words = run.data.training.words()
                card = replace(model.card, words=words)
                if isinstance(pictures, Scenes):
                    of_one = {word: name for word, name in pictures.maker.of_one_thing().items() if word in words}
                    things = seen_things(pictures.maker.things(), words)
                    card = replace(card, of_one_thing=of_one, things=things)
            save_model(replace(model, card=card), run.folder / "model")
    accelerator.wait_for_everyone()


def _samples(
    run: Run[Config], codec: AnyCodec, text_encoder: TextEncoder | ClassLabels, before: Sequence[Examples]
) -> list[Samples]:
    """The samples of the training and the validation set."""
    sets = (run.data.training, run.data.validation)
    latents = latents_of(run.config.denoiser, sets, codec, run.cache, run.accelerator)
    captions = captions_of(run.config.denoiser, sets, text_encoder, run.cache, run.accelerator)
    captions = _with_pictures(run, codec, sets, captions, before)
    names = [examples.pictures.name for examples in sets]
    return [Samples(*of_set) for of_set in zip(latents, captions, names, strict=True)]


def _reads_beside(config: Config) -> bool:
    """Whether the U-Net reads a picture beside its latents."""
    denoiser = config.denoiser
    return denoiser.enlarging.scale > 1 or bool(denoiser.editing.source) or denoiser.inpainting


def with_before(config: Config, data: DataSet, cache: Path | None) -> DataSet:
    """The data set with the identity of the pictures before, which an editing model reads. Raises DataError."""
    if not config.denoiser.editing.source:
        return data
    before = companions(config, [data.training, data.validation], config.denoiser.editing.source, cache)
    return replace(data, beside=before[0].pictures.identity())


def _before(run: Run[Config]) -> list[Examples]:
    """The pictures before, of an editing model's training and validation set; [] for other models."""
    source = run.config.denoiser.editing.source
    return companions(run.config, [run.data.training, run.data.validation], source, run.cache) if source else []


def _with_pictures(
    run: Run[Config],
    codec: AnyCodec,
    sets: Sequence[Examples],
    captions: list[Captions],
    before: Sequence[Examples],
) -> list[Captions]:
    """The captions with the picture that the U-Net reads beside its latents, if it reads one."""
    settings, seed = run.config.denoiser, run.config.seed
    if (enlarging := new_enlarging(run.config)) is not None:
        pairs = zip(captions, sets, strict=True)
        return [Small(own, examples, enlarging, factor=codec.factor, seed=seed) for own, examples in pairs]
    if settings.editing.source:
        rates = [settings.editing.dropout, 0.0]  # the validation shows all
        each = zip(captions, before, rates, strict=True)
        return [Edited(own, source, codec, rate, seed=seed) for own, source, rate in each]
    if settings.inpainting:
        return [Masked(own, examples, codec, seed=seed) for own, examples in zip(captions, sets, strict=True)]
    return captions


def networks_before(config: Config, folder: Path, examples: Examples) -> tuple[AnyCodec, TextEncoder | ClassLabels]:
    """The networks of the earlier stages in the run's folder. Raises ConfigError if one is missing.

    The classes of a network that reads classes are those of the training set.
    """
    parts = {"autoencoder": folder / "model" / "vae", "clip": folder / "clip" / "text_encoder"}
    for stage_before, part in parts.items():
        if stage_before in config.stages and not part.is_dir():
            raise ConfigError(f"the denoiser requires the {stage_before} of the same run ({part}). Train it first")
    begun = bool(config.denoiser.initial)  # its networks are in the places of the earlier stages
    codec = load_codec(folder / "model") if begun or "autoencoder" in config.stages else new_codec(config)
    return codec, load_text_encoder(folder / "clip") if config.reads_texts else ClassLabels(classes_of(examples))


def _backbone(
    config: Config, codec: AnyCodec, encoder: TextEncoder | ClassLabels, accelerator: Accelerator
) -> UNet | DiT:
    classes = len(encoder.names) if isinstance(encoder, ClassLabels) else 0
    with seeded(config.seed):
        backbone = new_backbone(config, codec.latent_channels, config.image_size // codec.factor, classes)
    prepare_unet(backbone, config.denoiser, accelerator)
    return backbone


def prepare_unet(unet: UNet | Transformer, learning: Learning, accelerator: Accelerator) -> None:
    """Make training fast on its device, and optionally small in memory; no number changes."""
    if isinstance(unet, UNet):
        laid_out_for(unet, accelerator.device, narrow=accelerator.mixed_precision != "no")
        if accelerator.device.type == "cpu":
            unet.use_plain_attention()
    if learning.gradient_checkpointing:
        unet.save_memory()


def _training(config: Config, examples: Examples, processes: int) -> tuple[DiffusionLoss, Draws, Order]:
    """The loss, a sample's draws, and the order, in which a step's samples of all processes share a bucket."""
    settings, path = config.denoiser, new_path(config)
    loss = DiffusionLoss(path, settings.prediction, settings.weighting, settings.snr_gamma)
    rates = settings.caption_dropout, settings.noise_offset, settings.input_perturbation
    batch = settings.training.train_batch_size * settings.training.gradient_accumulation_steps * processes
    order = Order(config.seed, "training", list(examples.pictures.buckets().values()), batch)
    samples = settings.posterior == "sample"
    return loss, Draws(config.seed, times_of(settings, path), *rates, samples=samples), order


def _validation(config: Config, examples: Examples) -> tuple[DiffusionLoss, Draws, Order]:
    """Likewise for validation: no weights, dropout, offset or perturbation; each picture once in each bin of time."""
    path = new_path(config)
    samples = config.denoiser.posterior == "sample"
    draws = Draws(config.seed, Times(path, bins=TIME_BINS), purpose="validation", samples=samples)
    order = Order(config.seed, "validation", list(examples.pictures.buckets().values()))
    return DiffusionLoss(path, config.denoiser.prediction), draws, order


def _references(run: Run[Config]) -> References:
    """The reference pictures of distances: those of `latentdiff evaluate` for the finished model, to the bit."""
    held, _ = held_out(run.config, run.config.denoiser.distance_pictures, run.data.survey)
    if not (run.folder / "model" / "clip").is_dir():
        raise ConfigError(f"distance_pictures requires the CLIP of the same run ({run.folder}). Train that stage first")
    extractor = of_model(run.folder / "model", run.folder / "clip")
    assert extractor.scorer is not None
    extractor.scorer.to(run.accelerator.device)
    return References(partial(pictures_of, held), extractor, extractor.scorer)


def _report(
    run: Run[Config],
    painter: Painter,
    validation: DenoiserStage,
    references: References | None,
    before: Sequence[Examples],
    step: int,
) -> dict[str, float]:
    """A validation: the loss; pictures of fixed prompts and seeds in `samples`, in rows by category or caption; their
    composition scores if the oracle can read them; optionally their distances from held-out pictures.
    """
    config, examples, directory = run.config, run.data.validation, run.folder / "denoiser" / "samples"
    painter = replace(painter, model=replace(painter.model, place=TorchPlace(run.accelerator.device)))
    batch_size = config.denoiser.training.train_batch_size
    numbers = validation_losses(validation, TIME_BINS, painter.model.path, batch_size)
    if painter.model.enlarging is not None or painter.model.must_edit:
        rows = _made_of_pictures(run, painter, examples, before)
    elif readable(config):
        score = evaluate_composition(painter, pictures=config.denoiser.preview_pictures, seed=config.seed)
        rows = [pictures[:8] for pictures in score.pictures.values()]
        numbers |= {"composition": score.overall} | {name: share.mean for name, share in score.categories.items()}
    else:
        rows = [draw_prompts(painter, prompts, seed=config.seed) for prompts in _prompts(config, examples)]
    if references is not None:
        unet, encoder = painter.model.backbone, painter.model.encoder
        assert isinstance(unet, UNet)
        assert isinstance(encoder, TextEncoder)
        with unet.as_loaded(), encoder.as_loaded():
            pictures = draw_pictures(painter, references.captions, seed=config.seed)
        numbers |= {name: figure.value for name, figure in all_distances(pictures, references).items()}
    sheet = np.concatenate([np.concatenate(list(row), 1) for row in rows])
    with atomic(directory / f"step-{step:08d}.png") as made:
        as_picture(sheet).save(made)
    return numbers


def _made_of_pictures(
    run: Run[Config], painter: Painter, examples: Examples, before: Sequence[Examples]
) -> list[np.ndarray]:
    """Rows of eight pictures: what an enlarging or editing model reads, what is drawn of it, and the true pictures."""
    rows, enlarging = range(min(8, len(examples))), painter.model.enlarging
    square = (run.config.image_size, run.config.image_size)
    true = [coloured(examples.image(row, 0, square)) for row in rows]
    if enlarging is not None:
        read = [reduced(pixels, enlarging.scale) for pixels in true]
    else:
        (source,) = before
        read = [coloured(source.image(row, 0, square)) for row in rows]
    prompts = [examples.caption(row, 0) for row in rows]
    after = draw_prompts(painter, prompts, seed=run.config.seed, images=read)
    seen = [resized(pixels, *whole.shape[:2]) for pixels, whole in zip(read, true, strict=True)]
    return [examples.toned(np.stack(seen)), after, examples.toned(np.stack(true))]


def _prompts(config: Config, examples: Examples) -> list[list[str]]:
    """Rows of 8 prompts: scenes of each category, or the captions of validation pictures."""
    if config.data.kind == "scenes":
        scenes_of = (evaluation_scenes(category, 8, config.seed) for category in scenes.CATEGORIES)
        return [[scene.caption for scene in chosen] for chosen in scenes_of]
    captions = [examples.caption(row % len(examples), 0) for row in range(max(8, config.denoiser.preview_pictures))]
    return [captions[first : first + 8] for first in range(0, len(captions) // 8 * 8, 8)]
