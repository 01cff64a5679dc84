"""Stage 3: the U-Net, and the text encoder by choice; completes `run/model`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from latentdiff.build import AnyAutoencoder, laid_out_for, new_autoencoder, new_pipeline, new_schedule, new_unet, seeded
from latentdiff.config import Config
from latentdiff.data import scenes
from latentdiff.diffusion.objective import DiffusionLoss
from latentdiff.errors import ConfigError
from latentdiff.evaluation.composition import evaluate_composition, evaluation_scenes
from latentdiff.models.folder import saving
from latentdiff.models.text_encoder import TextEncoder
from latentdiff.models.unet import UNet
from latentdiff.models.weights import load_autoencoder, load_text_encoder, weights_hash
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.stages.cache import captions_of, texts_of, training_latents, validation_latents
from latentdiff.stages.pictures import VALIDATION, readable, validation_scene
from latentdiff.stages.run import Run
from latentdiff.training.denoiser import (
    ConditionedNetwork,
    DenoiserStage,
    Draws,
    Latents,
    Texts,
    validation_losses,
)
from latentdiff.training.run import run_stage

TIME_BINS = 4  # of the validation loss


def train_denoiser(run: Run) -> None:
    """Train the U-Net (and the text encoder, by choice) on cached latents; completes `run/model`."""
    config, accelerator = run.config, run.accelerator
    autoencoder, text_encoder = _networks_before(config, run.folder)
    made_from = f"{weights_hash(autoencoder)} {weights_hash(text_encoder)}"
    unet = _unet(config, autoencoder, accelerator.device)
    contexts = config.denoiser.cache and not config.denoiser.tune_text_encoder
    network = unet if contexts else ConditionedNetwork(unet, text_encoder, config.denoiser.tune_text_encoder)
    stage_on = partial(_stage, config, network, unet, text_encoder)
    texts = texts_of(captions_of(config), text_encoder, accelerator.device, contexts=contexts)
    stage = stage_on(training_latents(run, autoencoder), texts)
    captions = [validation_scene(config, index).caption for index in range(VALIDATION)]
    validation = stage_on(
        validation_latents(config, autoencoder, accelerator.device),
        texts_of(captions, text_encoder, accelerator.device, contexts=contexts),
        purpose="validation",
    )
    pipe = new_pipeline(config, autoencoder, text_encoder, unet)
    report = partial(_report, config, run.folder / "denoiser" / "samples", pipe, validation)
    start = run.start("denoiser", made_from=made_from)
    settings = config.denoiser.training
    run_stage(accelerator, stage, settings, run.folder / "denoiser", report, start, run.interruption)
    if accelerator.is_main_process:
        with saving("the model", run.folder / "model"):
            pipe.save_pretrained(run.folder / "model")
    accelerator.wait_for_everyone()


def _networks_before(config: Config, folder: Path) -> tuple[AnyAutoencoder, TextEncoder]:
    """What the stages before left in the run folder. Raises ConfigError."""
    identity = config.autoencoder.kind == "identity"
    for stage_before, part in (("autoencoder", folder / "model" / "vae"), ("clip", folder / "clip" / "text_encoder")):
        if not part.is_dir() and not (stage_before == "autoencoder" and identity):
            raise ConfigError(f"the denoiser needs the {stage_before} of the same run ({part}). Train that stage first")
    autoencoder = new_autoencoder(config) if identity else load_autoencoder(folder / "model")
    return autoencoder, load_text_encoder(folder / "clip")


def _unet(config: Config, autoencoder: AnyAutoencoder, device: torch.device) -> UNet:
    with seeded(config.seed):
        unet = new_unet(config, autoencoder.latent_channels, config.image_size // autoencoder.factor)
    laid_out_for(unet, device)
    if device.type == "cpu":
        unet.use_plain_attention()
    if config.denoiser.gradient_checkpointing:
        unet.save_memory()
    return unet


def _stage(
    config: Config,
    network: nn.Module,
    unet: UNet,
    text_encoder: TextEncoder,
    latents: Latents,
    texts: Texts,
    purpose: str = "training",
) -> DenoiserStage:
    """The stage on a set of pictures; a validation keeps every caption and has neither offset nor perturbation."""
    settings, schedule = config.denoiser, new_schedule(config)
    draws = Draws(config.seed, schedule.T, purpose=purpose, time_bins=TIME_BINS)
    loss = DiffusionLoss(schedule, settings.prediction)
    if purpose == "training":
        rates = settings.caption_dropout, settings.noise_offset, settings.input_perturbation
        draws = Draws(config.seed, schedule.T, *rates)
        loss = DiffusionLoss(schedule, settings.prediction, settings.weighting, settings.snr_gamma)
    parts: dict[str, nn.Module] = {"unet": unet}
    if settings.tune_text_encoder:
        parts["text_encoder"] = text_encoder
    return DenoiserStage(network, parts, loss, latents, texts, draws)


def _report(
    config: Config, directory: Path, pipe: LatentDiffusionPipeline, validation: DenoiserStage, step: int
) -> dict[str, float]:
    """The validation loss; pictures at fixed prompts and seeds in `directory`, a row a category, and their
    composition scores where the oracle can read them.
    """
    timesteps = config.denoiser.schedule.num_train_timesteps
    numbers = validation_losses(validation, VALIDATION, TIME_BINS, timesteps, config.denoiser.training.train_batch_size)
    if readable(config):
        score = evaluate_composition(pipe, pictures=config.denoiser.preview_pictures, seed=config.seed)
        rows = [pictures[:8] for pictures in score.pictures.values()]
        numbers |= {"composition": score.overall} | {name: share.mean for name, share in score.categories.items()}
    else:
        rows = [_preview_row(config, pipe, category) for category in scenes.CATEGORIES]
    directory.mkdir(parents=True, exist_ok=True)
    sheet = np.concatenate([np.concatenate(list(row), 1) for row in rows])
    Image.fromarray(sheet.squeeze(-1) if sheet.shape[-1] == 1 else sheet).save(directory / f"step-{step:08d}.png")
    return numbers


def _preview_row(config: Config, pipe: LatentDiffusionPipeline, category: str) -> np.ndarray:
    captions = [scene.caption for scene in evaluation_scenes(category, 8, config.seed)]
    pictures: np.ndarray = pipe(captions, seed=config.seed, output_type="np").images
    return pictures
