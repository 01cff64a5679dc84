"""The composition root: from a config to objects, and from objects to the stages of a run.

The only module that knows everything. Networks come from `models`, pictures from `data`, losses from `training`;
none of those know each other.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latentdiff.config import Config
from latentdiff.data import oracle, scenes
from latentdiff.diffusion import noise
from latentdiff.models.autoencoder import Autoencoder, IdentityAutoencoder
from latentdiff.training.autoencoder import AutoencoderStage, psnr, to_images
from latentdiff.training.run import run_stage

VALIDATION = 128  # pictures that a validation looks at


def training_scene(config: Config, index: int) -> scenes.Scene:
    """Scene `index` of the run's training set; endless."""
    return scenes.scene(noise.generator(config.seed, "training scene", index))


def validation_scene(config: Config, index: int) -> scenes.Scene:
    """Scene `index` of a set that training never draws, of the same distribution."""
    return scenes.scene(noise.generator(config.seed, "validation scene", index))


def _pictures(scene: Callable[[int], scenes.Scene], first: int, count: int) -> np.ndarray:
    return np.stack([scenes.render(scene(index)) for index in range(first, first + count)])


def _accelerator(mixed_precision: str) -> Accelerator:
    return Accelerator(mixed_precision=mixed_precision)


# --- stage 1: the autoencoder --------------------------------------------------------------------------


def train_autoencoder(config: Config, run: Path) -> None:
    """Train the VAE, whiten its latents and save it as `run/model/vae`."""
    settings = config.autoencoder
    if settings.kind == "identity":
        return
    accelerator = _accelerator(settings.training.mixed_precision)
    torch.manual_seed(config.seed)  # initial weights are drawn by torch's modules themselves
    module = Autoencoder.create(
        settings.block_out_channels, settings.layers_per_block, settings.latent_channels, settings.norm_num_groups
    ).to(memory_format=torch.channels_last)
    stage = AutoencoderStage(
        module,
        lambda index: scenes.render(training_scene(config, index)),
        seed=config.seed,
        batch_size=settings.training.train_batch_size,
        crop=min(settings.crop, config.image_size),
        gradient_weight=settings.gradient_weight,
        kl_weight=settings.kl_weight,
        device=accelerator.device,
    )
    report = partial(_autoencoder_report, config, run / "autoencoder")
    trained = run_stage(accelerator, stage, settings.training, run / "autoencoder", report)
    assert isinstance(trained, Autoencoder)
    trained.fold_statistics(*latent_statistics(trained, config, accelerator.device))
    trained.save(run / "model" / "vae")


@torch.no_grad()
def latent_statistics(autoencoder: Autoencoder, config: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and std of each latent channel (C,), over posterior samples of 512 training pictures."""
    images = to_images(_pictures(partial(training_scene, config), 0, 512)).to(device)
    encoded = [autoencoder.encode(batch) for batch in images.split(64)]
    mean, log_variance = (torch.cat(parts) for parts in zip(*encoded, strict=True))
    center = mean.mean((0, 2, 3))
    variance = mean.var((0, 2, 3)) + log_variance.exp().mean((0, 2, 3))
    return center, variance.sqrt()


@torch.no_grad()
def _autoencoder_report(config: Config, directory: Path, step: int, module: nn.Module) -> dict[str, float]:
    """PSNR and the share of reconstructed validation scenes that the oracle still reads right."""
    assert isinstance(module, Autoencoder)
    module.eval()
    chosen = [validation_scene(config, index) for index in range(VALIDATION)]
    images = to_images(np.stack([scenes.render(scene) for scene in chosen]))
    decoded = torch.cat([module.decode(module.encode(b)[0]) for b in images.split(32)])
    right = [
        oracle.satisfies(oracle.read(picture), scene.description)
        for picture, scene in zip(to_pictures(decoded), chosen, strict=True)
    ]
    return {"psnr": psnr(images, decoded), "read_right": float(np.mean(right))}


def to_pictures(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) about in [-1, 1] -> uint8 (B, H, W, 3)."""
    scaled = images.float().clamp(-1, 1).add(1).mul(127.5).round()
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
