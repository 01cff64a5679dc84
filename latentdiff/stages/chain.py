"""The three stages of a run, in order."""

from __future__ import annotations

from collections.abc import Callable

from latentdiff.settings.config import Config
from latentdiff.stages.autoencoder import train_autoencoder
from latentdiff.stages.clip import train_clip
from latentdiff.stages.denoiser import train_denoiser
from latentdiff.stages.run import Run

TRAIN: dict[str, Callable[[Run[Config]], None]] = {
    "autoencoder": train_autoencoder,
    "clip": train_clip,
    "denoiser": train_denoiser,
}
