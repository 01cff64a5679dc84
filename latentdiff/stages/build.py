"""The composition root: from a config to the networks, the schedule and the pipeline it describes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from latentdiff.core.errors import ConfigError, raised_as
from latentdiff.diffusion.path import Path, Straight, schedule_named
from latentdiff.diffusion.times import Times
from latentdiff.networks.backbones.unet import UNet
from latentdiff.networks.clip import Clip
from latentdiff.networks.codecs.kl import Autoencoder, IdentityAutoencoder, TinyAutoencoder
from latentdiff.networks.encoders.clip import TextEncoder
from latentdiff.pipeline import LatentDiffusionPipeline, ModelCard
from latentdiff.settings.config import STAGES, Config, Learning
from latentdiff.training.optim import check_optimizer

AnyAutoencoder = Autoencoder | IdentityAutoencoder


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Initial weights from a seed. Modules draw them from torch's global generator and no other; it is put back."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def laid_out_for(module: nn.Module, device: torch.device) -> None:
    """Channels last on a GPU, whose tensor cores want it; on a CPU bfloat16 convolutions take 1.4 times as long so."""
    if device.type != "cpu":
        module.to(memory_format=torch.channels_last)


def image_channels(config: Config) -> int:
    """3 for colour, 1 for grey."""
    return 1 if config.data.grey else 3


def new_autoencoder(config: Config) -> AnyAutoencoder:
    """With random weights; `identity` has none."""
    settings = config.autoencoder
    if settings.kind == "identity":
        return IdentityAutoencoder(image_channels(config))
    kind = TinyAutoencoder if settings.kind == "tiny" else Autoencoder
    return kind.create(
        settings.block_out_channels,
        settings.layers_per_block,
        settings.latent_channels,
        settings.norm_num_groups,
        image_channels(config),
    )


def new_clip(config: Config) -> Clip:
    """Both towers with random weights."""
    return Clip.create(image_size=config.image_size, **config.clip.model_dump(exclude={"training"}))


def new_unet(config: Config, channels: int, side: int) -> UNet:
    """A U-Net with random weights for latents (channels, side, side) and the text encoder's contexts."""
    settings = config.denoiser
    return UNet.create(
        sample_size=side,
        channels=channels,
        context_dim=config.clip.text_width,
        block_out_channels=settings.block_out_channels,
        attention=settings.attention,
        layers_per_block=settings.layers_per_block,
        num_heads=settings.num_heads,
        norm_num_groups=settings.norm_num_groups,
        pooled_text=settings.pooled_text,
    )


def new_path(config: Config) -> Path:
    """The noise levels between pictures and noise."""
    settings = config.denoiser.schedule
    if config.denoiser.path == "straight":
        return Straight(config.denoiser.shift, T=settings.num_train_timesteps)
    schedule = schedule_named(settings.kind, settings.num_train_timesteps)
    return schedule.zero_terminal_snr() if settings.zero_terminal_snr else schedule


def times_of(learning: Learning, path: Path) -> Times:
    """Which times a training draws."""
    return Times(path, learning.times, learning.logit_mean, learning.logit_std)


def new_pipeline(
    config: Config, autoencoder: AnyAutoencoder, text_encoder: TextEncoder, unet: UNet
) -> LatentDiffusionPipeline:
    """The pipeline of trained networks, with the config's name, size and recommended settings."""
    return LatentDiffusionPipeline(
        autoencoder,
        text_encoder.eval(),
        unet.eval(),
        new_path(config),
        config.denoiser.prediction,
        ModelCard(
            name=config.name,
            size=(config.image_size, config.image_size),
            defaults=config.recommended.model_dump(),
        ),
    )


def check_networks(config: Config) -> None:
    """Build every network and run it once, without memory or arithmetic: sizes that do not fit together, and an
    optimizer that is not installed, are known before hours of training. Raises ConfigError.
    """
    for stage in STAGES:
        check_optimizer(getattr(config, stage).training)
    side, crop = config.image_size, min(config.autoencoder.crop, config.image_size)
    with torch.device("meta"):
        with _described("autoencoder"):
            autoencoder = new_autoencoder(config)
            if side % autoencoder.factor or crop % autoencoder.factor:
                raise ConfigError(f"image_size and autoencoder.crop must be multiples of {autoencoder.factor}")
            autoencoder.decode(autoencoder.encode(torch.zeros(1, image_channels(config), crop, crop))[0])
        with _described("clip"):
            new_clip(config)(torch.zeros(2, 3, side, side), torch.zeros(2, config.clip.max_length, dtype=torch.long))
        with _described("denoiser"):
            latents = torch.zeros(
                1, autoencoder.latent_channels, side // autoencoder.factor, side // autoencoder.factor
            )
            unet = new_unet(config, latents.shape[1], latents.shape[2])
            if latents.shape[2] % unet.factor:
                raise ConfigError(f"latents of side {latents.shape[2]} must be a multiple of the U-Net's {unet.factor}")
            step, multiple = config.data.pictures.bucket_step, autoencoder.factor * unet.factor
            if step and step % multiple:
                raise ConfigError(f"data.pictures.bucket_step must be a multiple of {multiple} (got {step})")
            unet(latents, 0, torch.zeros(1, config.clip.max_length, config.clip.text_width))


def _described(section: str) -> AbstractContextManager[None]:
    return raised_as(ConfigError, f"{section}: no network can be built as the config describes it")
