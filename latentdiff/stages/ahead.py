"""Filling a run's cache before its training, by one job or several."""

from __future__ import annotations

import re
from pathlib import Path

from latentdiff.core.errors import ConfigError
from latentdiff.data.dataset import DataSet
from latentdiff.families.own import check_networks
from latentdiff.networks.encoders.class_labels import ClassLabels
from latentdiff.settings.config import Config
from latentdiff.stages.cache import Shard, conditions_store, fill_conditions, fill_latents, latents_store, make_ready
from latentdiff.stages.denoiser import networks_before
from latentdiff.stages.initial import place_networks
from latentdiff.stages.run import new_accelerator


def parse_shard(text: str) -> Shard:
    """(i, n) of "i/n". Raises ConfigError."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not match or not int(match[1]) < int(match[2]):
        raise ConfigError(f"--shard must be i/n with i from 0 to n - 1 (got {text})")
    return int(match[1]), int(match[2])


def cache_ahead(config: Config, folder: Path, data: DataSet, share: Shard) -> tuple[int, int]:
    """Encode one share of what is missing; returns the numbers of pictures and captions.

    Raises ConfigError, DataError.
    """
    if not config.denoiser.cache:
        raise ConfigError("caching ahead requires denoiser.cache = true")
    check_networks(config)
    device = new_accelerator(config).device
    if config.denoiser.initial:
        place_networks(config.denoiser.initial, folder)
    autoencoder, text_encoder = networks_before(config, folder, data.training)
    if isinstance(text_encoder, ClassLabels):
        raise ConfigError("caching ahead is for networks that read texts; classes need none")
    cache, latents, contexts = folder / "cache", 0, 0
    of_pictures, of_captions = latents_store(config.denoiser, autoencoder, cache), conditions_store(text_encoder, cache)
    make_ready(autoencoder, config.denoiser, device)
    text_encoder.to(device)
    for examples in (data.training, data.validation):
        latents += fill_latents(config.denoiser, of_pictures, examples, autoencoder, device, share)
        captions = None if config.denoiser.tune_text_encoder else examples.every_caption()
        if captions is not None:
            contexts += fill_conditions(of_captions, captions, text_encoder, device, share)
    return latents, contexts
