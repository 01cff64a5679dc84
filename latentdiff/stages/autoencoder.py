"""Stage 1: the autoencoder, trained on crops of pictures, its latents whitened, saved as `model/vae`.

A tiny autoencoder learns another's latents, which are not whitened.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentdiff.core.errors import ConfigError, saving
from latentdiff.core.files import atomic
from latentdiff.core.images import to_images, to_uint8
from latentdiff.data.dataset import VALIDATION, readable
from latentdiff.data.examples import Examples
from latentdiff.data.scene_set import Scenes
from latentdiff.evaluation import oracle
from latentdiff.families import check_vae
from latentdiff.families.loading import located
from latentdiff.families.own import laid_out_for, new_codec, seeded
from latentdiff.families.weights import load_vae, weights_hash
from latentdiff.networks.codecs.autoencoder import Autoencoder, misfit
from latentdiff.networks.codecs.kl import KLAutoencoder
from latentdiff.settings.config import Config
from latentdiff.stages.encoding import in_batches
from latentdiff.stages.run import Run
from latentdiff.training.autoencoder import AutoencoderStage, TinyAutoencoderStage, psnr
from latentdiff.training.order import Order
from latentdiff.training.run import run_stage


def autoencoder_stage(config: Config, examples: Examples, device: torch.device) -> AutoencoderStage:
    """The stage with random weights."""
    settings = config.autoencoder
    with seeded(config.seed):
        module = new_codec(config)
    assert isinstance(module, Autoencoder)
    laid_out_for(module, device, narrow=config.mixed_precision != "no")
    crop = min(settings.crop, *(side for size in examples.pictures.buckets() for side in size))
    crop -= crop % module.factor
    common: dict[str, Any] = {
        "seed": config.seed,
        "crop": crop,
        "latent_shape": (module.latent_channels, crop // module.factor, crop // module.factor),
        "gradient_weight": settings.gradient_weight,
    }
    picture = _picture(config, examples)
    if settings.kind == "tiny":
        teacher = _teacher(settings.teacher, module).to(device)
        return TinyAutoencoderStage(module, picture, teacher, latent_weight=settings.latent_weight, **common)
    return AutoencoderStage(module, picture, kl_weight=settings.kl_weight, **common)


def _teacher(named: str, module: Autoencoder) -> Autoencoder:
    """The VAE that a tiny one learns from, in float32. Raises ConfigError if their shapes differ."""
    place = located(named or None).path
    teacher = load_vae(check_vae(place)).float()
    if why := misfit(teacher, module):
        raise ConfigError(f"autoencoder.teacher must have the same shape: {why} ({place})")
    return teacher


def _picture(config: Config, examples: Examples) -> Callable[[int], tuple[np.ndarray, str]]:
    """A function from positions to pictures and their names: new scenes without end, or the user's, epoch by epoch."""
    if isinstance(examples.pictures, Scenes):
        return lambda position: (examples.image(position, 0), examples.pictures.name(position))
    order = Order(config.seed, "autoencoder", [np.arange(len(examples))])

    def picture(position: int) -> tuple[np.ndarray, str]:
        row, epoch = order.key(position)
        return examples.image(row, epoch), examples.pictures.name(row)

    return picture


def train_autoencoder(run: Run[Config]) -> None:
    """Train the VAE, whiten its latents and save it as `run/model/vae`."""
    config, accelerator = run.config, run.accelerator
    if config.autoencoder.kind == "identity":
        return
    stage = autoencoder_stage(config, run.data.training, accelerator.device)
    module = stage.module
    assert isinstance(module, Autoencoder)
    report = partial(_report, config, run.data.validation, accelerator.device, stage)
    start = run.start("autoencoder", **({} if stage.teacher is None else {"made_from": weights_hash(stage.teacher)}))
    settings = config.autoencoder.training
    run_stage(accelerator, stage, settings, run.folder / "autoencoder", report, start, run.interruption)
    if accelerator.is_main_process:
        if isinstance(module, KLAutoencoder):
            module.fold_statistics(*latent_statistics(module, config, run.data.training, accelerator.device))
        place = run.folder / "model" / "vae"
        with saving("the autoencoder", place), atomic(place) as folder:
            module.save(folder)
    accelerator.wait_for_everyone()


@torch.no_grad()
def latent_statistics(
    autoencoder: Autoencoder, config: Config, examples: Examples, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Mean and std of each latent channel (C,) over posterior samples of 512 training pictures, cropped to squares."""
    endless = isinstance(examples.pictures, Scenes)
    images = _squares(config, examples, 512 if endless else min(512, len(examples))).to(device)
    mean, log_variance = in_batches(autoencoder.encode, images)
    center = mean.mean((0, 2, 3))
    variance = mean.var((0, 2, 3)) + log_variance.exp().mean((0, 2, 3))
    return center, variance.sqrt()


def _squares(config: Config, examples: Examples, count: int) -> Tensor:
    """The first pictures of a set, (count, C, S, S) in [-1, 1]."""
    size = (config.image_size, config.image_size)
    return to_images(np.stack([examples.image(row, 0, size) for row in range(count)]))


@torch.no_grad()
def _report(
    config: Config, validation: Examples, device: torch.device, stage: AutoencoderStage, step: int
) -> dict[str, float]:
    """PSNR and, if the oracle can read the pictures, the share of reconstructed scenes that it reads right."""
    stage.module.eval()
    images = _squares(config, validation, min(VALIDATION, len(validation))).to(device)
    decoded = torch.cat([stage.reconstruct(batch) for batch in torch.split(images, 32)])
    quality = {"psnr": psnr(images, decoded)}
    if isinstance(validation.pictures, Scenes) and readable(config):
        described = [validation.pictures.scene(row).description for row in range(len(images))]
        pairs = zip(to_uint8(decoded), described, strict=True)
        right = [oracle.satisfies(oracle.read(picture), description) for picture, description in pairs]
        quality["read_right"] = float(np.mean(right))
    return quality
