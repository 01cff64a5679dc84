"""Stage 1: the autoencoder, trained on crops of scenes, its latents whitened, saved as `model/vae`."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from latentdiff.build import laid_out_for, new_autoencoder, seeded
from latentdiff.config import Config
from latentdiff.data import oracle
from latentdiff.images import to_images, to_uint8
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.models.folder import saving
from latentdiff.stages.pictures import VALIDATION, pictures_of, readable, training_scene, validation_scene
from latentdiff.stages.run import Run
from latentdiff.training.autoencoder import AutoencoderStage, psnr
from latentdiff.training.run import run_stage


def autoencoder_stage(config: Config, device: torch.device) -> AutoencoderStage:
    """The stage with random weights."""
    settings = config.autoencoder
    with seeded(config.seed):
        module = new_autoencoder(config)
    assert isinstance(module, Autoencoder)
    laid_out_for(module, device)
    crop = min(settings.crop, config.image_size)
    return AutoencoderStage(
        module,
        lambda index: pictures_of(config, [training_scene(config, index)])[0],
        seed=config.seed,
        crop=crop,
        latent_shape=(module.latent_channels, crop // module.factor, crop // module.factor),
        gradient_weight=settings.gradient_weight,
        kl_weight=settings.kl_weight,
    )


def train_autoencoder(run: Run) -> None:
    """Train the VAE, whiten its latents and save it as `run/model/vae`."""
    config, accelerator = run.config, run.accelerator
    if config.autoencoder.kind == "identity":
        return
    stage = autoencoder_stage(config, accelerator.device)
    module = stage.module
    assert isinstance(module, Autoencoder)
    report = partial(_report, config, accelerator.device, module)
    start = run.start("autoencoder")
    settings = config.autoencoder.training
    run_stage(accelerator, stage, settings, run.folder / "autoencoder", report, start, run.interruption)
    if accelerator.is_main_process:
        module.fold_statistics(*latent_statistics(module, config, accelerator.device))
        with saving("the autoencoder", run.folder / "model" / "vae"):
            module.save(run.folder / "model" / "vae")
    accelerator.wait_for_everyone()


@torch.no_grad()
def latent_statistics(autoencoder: Autoencoder, config: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and std of each latent channel (C,), over posterior samples of 512 training pictures."""
    images = to_images(pictures_of(config, [training_scene(config, index) for index in range(512)])).to(device)
    encoded = [autoencoder.encode(batch) for batch in torch.split(images, 64)]
    mean, log_variance = (torch.cat(parts) for parts in zip(*encoded, strict=True))
    center = mean.mean((0, 2, 3))
    variance = mean.var((0, 2, 3)) + log_variance.exp().mean((0, 2, 3))
    return center, variance.sqrt()


@torch.no_grad()
def _report(config: Config, device: torch.device, module: Autoencoder, step: int) -> dict[str, float]:
    """PSNR and, where the oracle can read, the share of reconstructed validation scenes still read right."""
    module.eval()
    chosen = [validation_scene(config, index) for index in range(VALIDATION)]
    images = to_images(pictures_of(config, chosen)).to(device)
    decoded = torch.cat([module.decode(module.encode(batch)[0]) for batch in torch.split(images, 32)])
    quality = {"psnr": psnr(images, decoded)}
    if readable(config):
        pairs = zip(to_uint8(decoded), chosen, strict=True)
        right = [oracle.satisfies(oracle.read(picture), scene.description) for picture, scene in pairs]
        quality["read_right"] = float(np.mean(right))
    return quality
