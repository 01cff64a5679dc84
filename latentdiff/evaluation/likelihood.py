"""The likelihood of captioned pictures under a model: a bound in bits per dimension, with and without captions.

For 8-bit pixels x and latents z (Kingma & Welling 2014, eq. 3; Vahdat et al. 2021, eq. 2)

    -log p(x)  <=  E[-log p(x | z)]  -  H(q(z | x))  +  E[-log p(z)]        z ~ q(z | x)

decoder: p(x | z) is a discretised Laplace density around the decoded picture. Decoders have no width; each half of the
pictures uses the width that fits the other half best, so that no picture chooses its own.
latents: the diffusion bounds -log p(z) in its three terms (see diffusion/bound.py).
For a model without an autoencoder these three terms bound the likelihood of the pixels.

Everything is computed by torch in float32. One sample of z, and the noise and times of the bound, are keyed by the
picture: with captions and without, and under two models of the same latents, the draws are the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from latentdiff.core.errors import ModelError, NonFiniteError
from latentdiff.data.memo import read_memo, write_memo
from latentdiff.diffusion import noise
from latentdiff.diffusion.bound import Errors, Predict, bits, discretised, errors_of
from latentdiff.diffusion.parametrization import parametrization_named, x0_from
from latentdiff.drawing import pixels
from latentdiff.evaluation.large_arrays import CODED, batch_size
from latentdiff.model import Model
from latentdiff.networks.conditions import Conditions, stacked
from latentdiff.networks.encoders.prompt import Prompt, Style
from latentdiff.networks.protocols import Posterior, PreparesConditions

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float64]
AT_ONCE = 16  # pictures


@dataclass(frozen=True)
class Likelihood:
    """The terms of N pictures. decoder: -log p(x | z), entropy: H(q(z | x)), both (N,) nats, 0 without an autoencoder.

    cond and uncond: the bound on the latents with each picture's caption and with the empty one.
    """

    cond: Errors
    uncond: Errors
    decoder: Floats
    entropy: Floats
    dimensions: int
    """Values of a picture, H W C."""

    def bits(self, errors: Errors, variance: str = "small") -> Floats:
        """The bound on the pixels, (N,) bits per dimension."""
        nats = self.decoder - self.entropy + errors.total(variance)
        return np.asarray(bits(nats, self.dimensions))

    def gain(self, variance: str = "small") -> Floats:
        """The bits per dimension that captions save, (N,), on the same draws."""
        return self.bits(self.uncond, variance) - self.bits(self.cond, variance)


def likelihood(
    model: Model,
    pictures: np.ndarray,
    captions: Sequence[str],
    *,
    times: int,
    seed: int = 0,
    folder: Path | None = None,
) -> Likelihood:
    """Bound N > 1 pictures uint8 (N, H, W, 3), each at `times` random times and at the first.

    model: torch's, in float32. folder: a folder for only this model and these pictures; it stores every batch's errors,
    so that an interrupted call can go on. Raises ModelError for an autoencoder without a posterior, NonFiniteError.
    """
    from latentdiff.networks.codecs.identity import IdentityCodec

    if not isinstance(model.codec, Posterior):
        raise ModelError("a tiny VAE has no posterior, so pixels have no likelihood")
    if len(pictures) < 2:
        raise ValueError("a likelihood requires at least two pictures: each uses the other's width")
    plain = isinstance(model.codec, IdentityCodec)
    dimensions = math.prod(pictures.shape[1:3]) * model.codec.image_channels
    pairs: list[tuple[Errors, Errors]] = []
    for rows in tqdm(list(_batches(pictures)), "likelihood", disable=None):
        file, rules = folder and folder / f"{rows[0]:05d}.json", [times, seed, len(rows)]
        if file and (kept := read_memo(file, rules)):
            pairs.append((Errors.from_tree(kept[0], model.path), Errors.from_tree(kept[1], model.path)))
            continue
        x0 = _sampled(*_posterior(model, pictures[rows]), seed, rows)
        arguments: dict[str, Any] = {"count": times, "seed": seed, "samples": rows, "pixels": plain}
        own, empty = (
            _conditions(model, words, pictures.shape[1:3])
            for words in ([captions[row] for row in rows], [""] * len(rows))
        )
        both = [errors_of(_predict(model, conditions), x0, model.path, **arguments) for conditions in (own, empty)]
        pairs.append((both[0], both[1]))
        if file:
            write_memo(file, rules, [errors.as_tree() for errors in both])
    cond, uncond = (Errors.joined(parts) for parts in zip(*pairs, strict=True))
    decoder, entropy = np.zeros((2, len(pictures))) if plain else _autoencoder(model, pictures, seed)
    made = Likelihood(cond, uncond, decoder, entropy, dimensions)
    for errors in (cond, uncond):
        if not np.isfinite(made.bits(errors)).all():
            raise NonFiniteError("the likelihood is not finite. The model's weights may be damaged")
    return made


def _batches(pictures: np.ndarray) -> Iterator[list[int]]:
    """The numbers of the pictures, in batches that fit into memory."""
    size = batch_size(CODED, pictures.shape[1:3], AT_ONCE)
    for first in range(0, len(pictures), size):
        yield list(range(first, min(first + size, len(pictures))))


def _posterior(model: Model, pictures: np.ndarray) -> tuple[Tensor, Tensor]:
    import torch

    assert isinstance(model.codec, Posterior)
    with torch.no_grad():
        return model.codec.posterior(pixels.as_images(model, pictures))


def _sampled(mean: Tensor, log_variance: Tensor, seed: int, rows: Sequence[int]) -> Tensor:
    draws = np.stack([noise.normal(tuple(mean.shape[1:]), seed, "bound posterior", row) for row in rows])
    return mean + (0.5 * log_variance).exp() * mean.new_tensor(draws)


def _autoencoder(model: Model, pictures: np.ndarray, seed: int) -> tuple[Floats, Floats]:
    """-log p(x | z) and H(q(z | x)), (N,) nats each."""
    halves = np.arange(len(pictures)) % 2
    errors, entropy = [], []
    for pairs, entropies in _decoded(model, pictures, seed):
        errors += [np.abs(x - mean).mean() for x, mean in pairs]
        entropy += entropies
    off = np.array(errors)
    widths = [off[halves != half].mean() for half in halves]  # the best width of a Laplace density is the mean error
    decoder: list[float] = []
    for pairs, _ in _decoded(model, pictures, seed):
        for x, mean in pairs:
            decoder.append(-discretised(x, mean, widths[len(decoder)], "laplace").sum())
    return np.array(decoder), np.array(entropy)


def _decoded(
    model: Model, pictures: np.ndarray, seed: int
) -> Iterator[tuple[list[tuple[np.ndarray, np.ndarray]], list[float]]]:
    """(picture, decoded sample), (C, H, W) each in [-1, 1], and the posterior's entropy, a batch at a time."""
    import torch

    for rows in _batches(pictures):
        mean, log_variance = _posterior(model, pictures[rows])
        entropy = 0.5 * (log_variance.double() + math.log(2 * math.pi * math.e)).flatten(1).sum(1)
        with torch.no_grad():
            decoded = model.codec.images_of(_sampled(mean, log_variance, seed, rows)).cpu().numpy()
        images = pixels.as_images(model, pictures[rows]).cpu().numpy()
        yield list(zip(images, decoded, strict=True)), entropy.tolist()


def _conditions(model: Model, captions: Sequence[str], size: tuple[int, ...]) -> Conditions:
    """Conditions of captions, as training reads them: without weights, cut to the text encoder's length."""
    style = Style(False, False, model.card.defaults.get("clip_skip"))
    sizes = tuple(map(float, (*size, 0, 0, *size))) if model.reads_sizes else None
    rows = {caption: model.encoder.encode(Prompt(caption, style, sizes=sizes)) for caption in dict.fromkeys(captions)}
    return stacked([rows[caption] for caption in captions]).mapped(model.array)


def _predict(model: Model, conditions: Conditions) -> Predict:
    """The network's prediction for the bound, whose rows have different times."""
    import torch

    backbone, coefficients = model.backbone, parametrization_named(model.prediction)
    ready = backbone.prepared(conditions) if isinstance(backbone, PreparesConditions) else conditions

    def predict(x: Tensor, times: NDArray[np.int64]) -> Tensor:
        each = [coefficients(model.path.numbered(int(number))) for number in times]
        scaled = torch.stack([c.scale * row if c.scale != 1 else row for c, row in zip(each, x, strict=True)])
        output = backbone.predict(scaled, torch.tensor([c.time for c in each], device=x.device), ready)
        return torch.stack([x0_from(*row) for row in zip(each, output, x, strict=True)])

    return predict
