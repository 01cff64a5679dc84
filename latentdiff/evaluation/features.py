"""Features of pictures, by a network with a name and a hash; distances compare them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from latentdiff.core import cache as user_cache
from latentdiff.core.errors import ConfigError, NonFiniteError
from latentdiff.core.images import coloured, to_images

if TYPE_CHECKING:
    from latentdiff.networks.scorer import Scorer

AT_ONCE = 32
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Extractor:
    """pictures uint8 (B, H, W, 3) -> features (B, E), by a network of this name and sha256.

    scorer: the same network with its text tower, if it has one.
    """

    name: str
    hash: str
    features: Callable[[np.ndarray], Floats]
    scorer: Scorer | None = None
    at_once: int = AT_ONCE

    def of(self, pictures: np.ndarray) -> Floats:
        """Features (N, E) of uint8 (N, H, W, C), in batches of one size, so that rows do not depend on each other."""
        rows = []
        for first in range(0, len(pictures), self.at_once):
            some = coloured(pictures[first : first + self.at_once])
            lacking = self.at_once - len(some)
            filled = np.concatenate([some, np.zeros((lacking, *some.shape[1:]), np.uint8)]) if lacking else some
            rows.append(self.features(filled)[: len(some)])
        result = np.concatenate(rows)
        if not np.isfinite(result).all():
            raise NonFiniteError(f"features are not finite ({self.name}). Its weights may be damaged")
        return result

    def of_known(self, pictures: np.ndarray) -> Floats:
        """Features of reference pictures, cached in the user's directory for later evaluations.

        The first batch is computed again. If a bit of it differs (another device, setting or library), all are.
        """
        digest = hashlib.sha256(f"{self.name} {self.hash} {pictures.shape}".encode())
        digest.update(np.ascontiguousarray(pictures).data)
        file, first = user_cache.file(f"{digest.hexdigest()}.features"), self.of(pictures[: self.at_once])
        if file and (kept := user_cache.kept(file)) and kept.is_whole():
            known: Floats = np.load(io.BytesIO(kept.content.data), allow_pickle=False)
            if np.array_equal(known[: self.at_once], first):
                return known
        result = np.concatenate([first, self.of(pictures[self.at_once :])]) if len(pictures) > len(first) else first
        if file:
            content = io.BytesIO()
            np.save(content, result, allow_pickle=False)
            user_cache.keep(file, content.getvalue())
        return result


def of_clip(scorer: Scorer, name: str, sha256: str) -> Extractor:
    """An extractor of CLIP's unit embeddings."""
    import torch

    @torch.no_grad()
    def features(pictures: np.ndarray) -> Floats:
        images = to_images(pictures).to(scorer.mean.device)
        return np.asarray(scorer.images(images).cpu().float().numpy())

    return Extractor(name, sha256, features, scorer)


def of_model(folder: Path, text_encoder: Path | None = None, name: str = "the model's own CLIP") -> Extractor:
    """The CLIP in the folder of a model trained here. Raises ConfigError if it has none.

    text_encoder: the folder of the text encoder that shares its embeddings, if it is not in the model's folder yet.
    """
    from latentdiff.core.files import sha256_of
    from latentdiff.families.clip import WEIGHTS, load_own_scorer

    if not (folder / "clip").is_dir():
        raise ConfigError(f"this model has no CLIP of its own ({folder}). Name one by --features")
    return of_clip(load_own_scorer(folder, text_encoder), name, sha256_of(folder / "clip" / WEIGHTS))


def named(path: Path) -> Extractor:
    """A folder in open_clip's format, a model folder that has a CLIP, or a safetensors file of FID's Inception.

    Raises ConfigError, ModelError, UnsafeError.
    """
    from latentdiff.core.files import sha256_of
    from latentdiff.families.clip import WEIGHTS, load_scorer
    from latentdiff.formats.tensors import read_tensors
    from latentdiff.networks.perception import inception

    if path.is_file():
        return _of_inception(inception(read_tensors(path), path), sha256_of(path))
    if (path / "clip").is_dir():
        return of_model(path, name=f"the CLIP of {path.resolve().name}")
    return of_clip(load_scorer(path), f"open_clip {path.name}", sha256_of(path / WEIGHTS))


def _of_inception(network: Callable[..., object], sha256: str) -> Extractor:
    import torch

    def features(pictures: np.ndarray) -> Floats:
        result = network(torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))))
        return np.asarray(result)

    return Extractor("Inception v3, pool 2048", sha256, features, at_once=8)  # it enlarges pictures to 299 pixels
