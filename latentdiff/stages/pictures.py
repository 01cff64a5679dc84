"""The pictures and captions that a config describes: its training set, its validation set, and their fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from latentdiff.config import Config
from latentdiff.data import scenes
from latentdiff.diffusion import noise
from latentdiff.images import luminance

VALIDATION = 128  # pictures that a validation looks at


def training_scene(config: Config, index: int) -> scenes.Scene:
    """Scene `index` of the run's training set; endless."""
    return scenes.scene(noise.generator(config.seed, "training scene", index), mix=config.data.mix)


def validation_scene(config: Config, index: int) -> scenes.Scene:
    """Scene `index` of a set that training never draws, of the same distribution."""
    return scenes.scene(noise.generator(config.seed, "validation scene", index), mix=config.data.mix)


def pictures_of(config: Config, chosen: Sequence[scenes.Scene]) -> np.ndarray:
    """Rendered scenes, uint8 (N, S, S, C), as the config wants them: its size, colour or grey."""
    rendered = np.stack([scenes.render(scene, config.image_size) for scene in chosen])
    return luminance(rendered) if config.data.grey else rendered


def readable(config: Config) -> bool:
    """Whether the oracle can read this model's pictures."""
    return config.image_size == scenes.SIZE and not config.data.grey


def fingerprint(config: Config) -> dict[str, Any]:
    """How many pictures there are and a sha256 of what they are: the settings that draw them and the first of them,
    so that a change of the drawing itself is seen too.
    """
    settings = json.dumps([config.seed, config.image_size, config.data.model_dump()])
    digest = hashlib.sha256(settings.encode())
    first = [training_scene(config, index) for index in range(min(16, config.data.count))]
    digest.update(pictures_of(config, first).tobytes())
    digest.update("\n".join(scene.caption for scene in first).encode())
    return {"images": config.data.count, "sha256": digest.hexdigest()}
