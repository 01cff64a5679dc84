"""The loss of an autoencoder: decoded pictures beside their originals, and statistics of the latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from latentdiff.core.arrays import to_numpy
from latentdiff.core.errors import NonFiniteError
from latentdiff.core.images import to_images, to_uint8
from latentdiff.drawing import pixels
from latentdiff.evaluation.large_arrays import CODED, batch_size, concatenated
from latentdiff.model import Model

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float64]
AT_ONCE = 16
SMALLEST = 11  # pixels; SSIM's window


@dataclass(frozen=True)
class Decoded:
    """Pictures through the posterior's mean and back, uint8 (N, H, W, C); moments of the latents by channel, (C,)."""

    pictures: NDArray[np.uint8]
    mean: Floats
    std: Floats


def decoded(model: Model, pictures: np.ndarray, folder: Path | None = None) -> Decoded:
    """Encode and decode pictures uint8 (N, H, W, 3). folder: a place for arrays that are too large for memory."""
    first, second, count = np.zeros(1), np.zeros(1), 0

    def batches() -> Iterator[np.ndarray]:
        nonlocal first, second, count
        size = batch_size(CODED, pictures.shape[1:3], AT_ONCE)
        for start in tqdm(range(0, len(pictures), size), "autoencoder", disable=None):
            latents = pixels.encode_images(model, pixels.as_images(model, pictures[start : start + size]))
            values = to_numpy(latents).astype(np.float64)
            first, second = first + values.sum((0, 2, 3)), second + (values**2).sum((0, 2, 3))
            count += values[:, 0].size
            images = to_numpy(pixels.decode(model, latents))
            if not (np.isfinite(values).all() and np.isfinite(images).all()):
                raise NonFiniteError("the autoencoder gives values that are not finite. Its weights may be damaged")
            yield to_uint8(images)

    made = concatenated(batches(), len(pictures), folder)
    average = first / count
    return Decoded(made, average, np.sqrt(np.maximum(second / count - average**2, 0)))


def psnr(pictures: np.ndarray, others: np.ndarray) -> Floats:
    """Peak signal-to-noise ratios (N,) in dB, of uint8 (N, H, W, C): 20 log10(255 / RMS); 100 where all is equal."""
    squared = [((a.astype(np.float64) - b) ** 2).mean() for a, b in zip(pictures, others, strict=True)]
    return np.asarray(10 * np.log10(255**2 / np.maximum(squared, 255**2 / 1e10)))


def ssim(pictures: np.ndarray, others: np.ndarray) -> Floats:
    """Structural similarities (N,), at most 1, by Gaussian windows of 11 pixels (Wang et al. 2004, eq. 13)."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    parts = []
    for i in range(0, len(pictures), AT_ONCE):
        # intensities must start at 0: in [-1, 1] the first factor has no meaning
        made, real = ((to_images(each[i : i + AT_ONCE]) + 1) / 2 for each in (others, pictures))
        values: Any = structural_similarity_index_measure(made, real, data_range=1.0, reduction="none")
        parts.append(np.atleast_1d(values.numpy()))
    return np.concatenate(parts).astype(np.float64)


def perceptual(distance: Callable[[Tensor, Tensor], Any], pictures: np.ndarray, others: np.ndarray) -> Floats:
    """LPIPS (N,), of pictures in colour."""
    results = []
    for i in range(0, len(pictures), AT_ONCE):
        results.append(distance(to_images(pictures[i : i + AT_ONCE]), to_images(others[i : i + AT_ONCE])).numpy())
    return np.concatenate(results).astype(np.float64)
