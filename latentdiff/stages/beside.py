"""Pictures that networks read beside captions in training: each class wraps the captions of a set.

Hinted      a ControlNet: an annotator's picture of the sample's own
OwnPicture  an IP-Adapter: CLIP's features of the sample's own picture
Small       a network that enlarges: the picture made small, and noised
Edited      a network that edits: the picture before
Masked      a network that fills in: a mask, and the picture without what it covers

All draws are keyed by the run's seed, the purpose, the row and the epoch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from latentdiff.core.annotators import Annotator
from latentdiff.core.images import coloured, to_images, to_values
from latentdiff.data.examples import Examples
from latentdiff.data.masks import random_mask
from latentdiff.diffusion import noise
from latentdiff.diffusion.process import diffuse
from latentdiff.drawing.canvas import reduced, resized
from latentdiff.drawing.start import latent_mask
from latentdiff.model import Enlarging
from latentdiff.networks.conditions import BESIDE, FEATURES, HINT, Conditions
from latentdiff.networks.controls.ip_adapter import IPAdapter
from latentdiff.stages.encoding import AnyCodec
from latentdiff.training.denoiser import Captions, Key


class Hinted:
    """Captions, and beside them the picture that a control reads: an annotator's of the sample's own."""

    def __init__(self, captions: Captions, examples: Examples, annotate: Annotator):
        self._captions, self._examples, self._annotate = captions, examples, annotate

    def batch(self, keys: Sequence[Key], kept: Sequence[bool]) -> dict[str, Tensor]:
        """The captions' inputs, and `hint`, uint8 (B, 3, H, W)."""
        hints = np.stack([self._annotate(coloured(self._examples.image(*key))) for key in keys])
        return self._captions.batch(keys, kept) | {HINT: torch.from_numpy(hints).permute(0, 3, 1, 2).contiguous()}

    def conditions(self, batch: dict[str, Tensor]) -> Conditions:
        """The captions' conditions and the hint in [0, 1]."""
        return self._captions.conditions(batch).joined({HINT: batch[HINT].float() / 255})


class Small:
    """Captions, and beside them the small picture that a model enlarges, noised by a time that is drawn too.

    factor: pixels of a latent's side. The small picture is enlarged to the grid of latents.
    """

    def __init__(self, captions: Captions, examples: Examples, enlarging: Enlarging, *, factor: int, seed: int):
        self._captions, self._examples, self._enlarging = captions, examples, enlarging
        self._factor, self._seed = factor, seed

    def batch(self, keys: Sequence[Key], kept: Sequence[bool]) -> dict[str, Tensor]:
        """The captions' inputs, `beside` (B, C, h, w) and `label` (B,)."""
        pairs = [self._seen(*key) for key in keys]
        beside, labels = (torch.from_numpy(np.stack(each)) for each in zip(*pairs, strict=True))
        return self._captions.batch(keys, kept) | {BESIDE: beside, "label": labels}

    def _seen(self, row: int, epoch: int) -> tuple[np.ndarray, np.float32]:
        enlarging, pixels = self._enlarging, coloured(self._examples.image(row, epoch))
        height, width = (side // self._factor for side in pixels.shape[:2])
        seen = resized(reduced(pixels, enlarging.scale), height, width)
        values = to_values(self._examples.toned(seen)[None])[0]
        rng = noise.generator(self._seed, "small picture", row, epoch)
        level = enlarging.path.level(int(rng.integers(enlarging.times)))
        noised = diffuse(values, rng.standard_normal(values.shape, dtype=np.float32), level)
        return np.asarray(noised, np.float32), np.float32(level.t)

    def conditions(self, batch: dict[str, Tensor]) -> Conditions:
        """The captions' conditions, the small picture and the time of its noise."""
        return self._captions.conditions(batch).joined({BESIDE: batch[BESIDE], "label": batch["label"]})


class Edited:
    """Captions, and beside them the latents of the picture before, from which the network makes the sample's.

    dropout: the share of samples without one, keyed by seed, row and epoch.
    """

    def __init__(self, captions: Captions, before: Examples, codec: AnyCodec, dropout: float, *, seed: int):
        self._captions, self._before, self._codec = captions, before, codec
        self._dropout, self._seed = dropout, seed

    def batch(self, keys: Sequence[Key], kept: Sequence[bool]) -> dict[str, Tensor]:
        """The captions' inputs, `pixels` (B, C, H, W) in [-1, 1], and `visible` (B,)."""
        pixels = to_images(np.stack([self._before.image(*key) for key in keys]))
        draws = [noise.generator(self._seed, "picture before", *key).random() for key in keys]
        visible = torch.tensor([draw >= self._dropout for draw in draws])
        return self._captions.batch(keys, kept) | {"pixels": pixels, "visible": visible}

    def conditions(self, batch: dict[str, Tensor]) -> Conditions:
        """The captions' conditions and the latents, zeros where no picture is visible."""
        latents = self._codec.latents_of(batch["pixels"])
        return self._captions.conditions(batch).joined({BESIDE: latents * batch["visible"].view(-1, 1, 1, 1)})


class Masked:
    """Captions, and beside them a mask and the latents of what it leaves; the masks are drawn, see `data/masks.py`."""

    def __init__(self, captions: Captions, examples: Examples, codec: AnyCodec, *, seed: int):
        self._captions, self._examples, self._codec, self._seed = captions, examples, codec, seed

    def batch(self, keys: Sequence[Key], kept: Sequence[bool]) -> dict[str, Tensor]:
        """The captions' inputs, `pixels` (B, C, H, W) with the masked part 0, and `masked` (B, 1, h, w)."""
        pictures = [self._examples.image(*key) for key in keys]
        masks = [
            random_mask(noise.generator(self._seed, "mask", *key), p.shape[:2])
            for key, p in zip(keys, pictures, strict=True)
        ]
        visible = to_values(np.stack(pictures)) * (np.stack(masks)[:, None] == 0)
        small = np.concatenate([latent_mask(mask, self._codec.factor) for mask in masks])
        own = {"pixels": torch.from_numpy(visible), "masked": torch.from_numpy(small)}
        return self._captions.batch(keys, kept) | own

    def conditions(self, batch: dict[str, Tensor]) -> Conditions:
        """The captions' conditions, and the mask with the latents, as inpainting models read them."""
        latents = self._codec.latents_of(batch["pixels"])
        return self._captions.conditions(batch).joined({BESIDE: torch.cat([batch["masked"], latents], 1)})


class OwnPicture:
    """Captions, and beside them the features of the sample's own picture, which an IP-Adapter reads.

    dropout: the share of samples without a visible picture, keyed by seed, row and epoch.
    """

    def __init__(self, captions: Captions, examples: Examples, dropout: float, *, adapter: IPAdapter, seed: int):
        assert adapter.encoder is not None
        self._captions, self._examples, self._dropout = captions, examples, dropout
        self._encoder, self._all_states, self._seed = adapter.encoder, adapter.reads_all_states, seed

    def batch(self, keys: Sequence[Key], kept: Sequence[bool]) -> dict[str, Tensor]:
        """The captions' inputs, `visible` (B,), and `pixels` as CLIP reads them."""
        pixels = self._encoder.pixels([coloured(self._examples.image(*key)) for key in keys])
        draws = [noise.generator(self._seed, "image prompt", *key).random() for key in keys]
        visible = torch.tensor([draw >= self._dropout for draw in draws])
        return self._captions.batch(keys, kept) | {"pixels": pixels, "visible": visible}

    def conditions(self, batch: dict[str, Tensor]) -> Conditions:
        """The captions' conditions and the features (B, 1, D), zeros where no picture is visible."""
        features = self._encoder(batch["pixels"], all_states=self._all_states).float()
        features = features * batch["visible"].view(-1, *[1] * (features.ndim - 1))
        return self._captions.conditions(batch).joined({FEATURES: features[:, None]})
