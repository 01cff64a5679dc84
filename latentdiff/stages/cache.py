"""The training set of the denoiser: moments of latents and captions, encoded once before, or in every step.

A cache has rows by identity (a picture's bytes and all operations on them; a caption's words), in a folder for each
network that computes them: an edit is another row, another network another folder, and nothing stale can be read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from latentdiff.core.errors import ConfigError, DataError
from latentdiff.core.images import to_images
from latentdiff.data.examples import Examples
from latentdiff.data.store import Store
from latentdiff.families.own import laid_out_for
from latentdiff.networks.conditions import Conditions
from latentdiff.networks.encoders.class_labels import ClassLabels
from latentdiff.settings.config import Learning
from latentdiff.stages.encoding import (
    AT_ONCE,
    AnyCodec,
    AnyEncoder,
    AnyTextEncoder,
    encoded,
    encoded_prompts,
    finite,
    identity_of,
    moments_of,
)
from latentdiff.training.denoiser import Captions, Key, Latents

ROWS_A_FILE = 256  # at most this many are lost by a kill
Shard = tuple[int, int]  # (i, n): the i-th of n jobs
ALL: Shard = (0, 1)
_STORED = ("tokens", "pooled", "mask")  # conditions that depend on the caption alone
_Taken = tuple[str, int, np.ndarray]  # key, row, pixels
_Moments = tuple[Tensor, Tensor]


class CachedLatents:
    """Moments from the cache."""

    def __init__(self, store: Store, examples: Examples, autoencoder: AnyCodec):
        self._store, self._examples, self._shape = store, examples, _shape_of(examples, autoencoder)

    def shape(self, row: int) -> tuple[int, ...]:
        """(C, h, w)."""
        return self._shape(row)

    def batch(self, keys: Sequence[Key]) -> dict[str, Tensor]:
        """Stored moments, in half precision."""
        examples = self._examples
        return self._store.rows([examples.key(row, examples.view(row, epoch)) for row, epoch in keys])

    def moments(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The stored moments."""
        return batch["mean"].float(), batch["log_variance"].float()


class EncodedLatents:
    """Moments computed in every step."""

    def __init__(self, examples: Examples, autoencoder: AnyCodec, dtype: str = "float32"):
        self._examples, self._autoencoder, self._dtype = examples, autoencoder, dtype
        self._shape = _shape_of(examples, autoencoder)

    def shape(self, row: int) -> tuple[int, ...]:
        """(C, h, w)."""
        return self._shape(row)

    def batch(self, keys: Sequence[Key]) -> dict[str, Tensor]:
        """Images (B, C, H, W) in [-1, 1]."""
        return {"images": to_images(np.stack([self._examples.image(*key) for key in keys]))}

    def moments(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The moments of the images."""
        mean, log_variance = moments_of(self._autoencoder, batch["images"], self._dtype)
        return mean.float(), log_variance.float()


class TokenIds:
    """Captions for a text encoder that is trained too; sized: the backbone reads sizes, as SDXL's does."""

    def __init__(self, examples: Examples, text_encoder: AnyTextEncoder, *, sized: bool = False):
        self._examples, self._tokenize, self._sized = examples, text_encoder.tokenize, sized
        examples.caption(0, 0)  # the first call computes the captions of all scenes: once, before workers are forked

    def batch(self, keys: Sequence[Key], kept: Sequence[bool]) -> dict[str, Tensor]:
        """Token ids (B, L), or (B, 2, L) for two encoders, and sizes (B, 6)."""
        ids = self._tokenize(_captions(self._examples, keys, kept))
        return {"ids": ids, **_sizes(self._examples, keys, self._sized)}

    def conditions(self, batch: dict[str, Tensor]) -> Conditions:
        """The ids, and the sizes if the backbone reads them."""
        return Conditions({name: batch[name] for name in ("ids", "sizes") if name in batch})


class EncodedCaptions(TokenIds):
    """Conditions computed in every step."""

    def __init__(self, examples: Examples, text_encoder: AnyTextEncoder, *, sized: bool = False):
        super().__init__(examples, text_encoder, sized=sized)
        self._text_encoder = text_encoder

    def conditions(self, batch: dict[str, Tensor]) -> Conditions:
        """The conditions of the token ids."""
        return _with_sizes(encoded(self._text_encoder, batch["ids"]).cast(torch.float32), batch)


class EncodedPrompts:
    """Conditions computed in every step by encoders that take prompts, not token ids: they are never trained here."""

    def __init__(self, examples: Examples, encoder: AnyEncoder):
        self._examples, self._encoder = examples, encoder
        examples.caption(0, 0)

    def batch(self, keys: Sequence[Key], kept: Sequence[bool]) -> dict[str, Tensor]:
        """The conditions, in half precision."""
        captions = _captions(self._examples, keys, kept)
        return {name: array.cpu() for name, array in encoded_prompts(self._encoder, captions).arrays.items()}

    def conditions(self, batch: dict[str, Tensor]) -> Conditions:
        """The same, in float32."""
        return Conditions({name: batch[name].float() for name in _STORED if name in batch})


class CachedCaptions:
    """Conditions from the cache."""

    def __init__(self, store: Store, examples: Examples, *, sized: bool = False):
        self._store, self._examples, self._sized = store, examples, sized

    def batch(self, keys: Sequence[Key], kept: Sequence[bool]) -> dict[str, Tensor]:
        """Stored `tokens` (B, L, D), `pooled` (B, P), `mask` (B, L), in half precision, and sizes (B, 6)."""
        captions = _captions(self._examples, keys, kept)
        stored = self._store.rows([_key_of(caption) for caption in captions])
        return stored | _sizes(self._examples, keys, self._sized)

    def conditions(self, batch: dict[str, Tensor]) -> Conditions:
        """The stored conditions, in float32."""
        stored = Conditions({name: batch[name].float() for name in _STORED if name in batch})
        return _with_sizes(stored, batch)


class Classes:
    """The labels of captions that are names of classes."""

    def __init__(self, examples: Examples, encoder: ClassLabels):
        self._examples, self._encoder = examples, encoder

    def batch(self, keys: Sequence[Key], kept: Sequence[bool]) -> dict[str, Tensor]:
        """Labels (B,)."""
        return {"label": self._encoder.labels(_captions(self._examples, keys, kept))}

    def conditions(self, batch: dict[str, Tensor]) -> Conditions:
        """The labels."""
        return Conditions({"label": batch["label"]})


def _with_sizes(conditions: Conditions, batch: dict[str, Tensor]) -> Conditions:
    return conditions.joined({"sizes": batch["sizes"]} if "sizes" in batch else {})


def make_ready(autoencoder: AnyCodec, learning: Learning, device: torch.device) -> None:
    """Put an autoencoder on its device, in the memory layout for encoding, which changes the last bits of latents."""
    autoencoder.to(device)
    laid_out_for(autoencoder, device, narrow=learning.encode_dtype != "float32")


def latents_of(
    learning: Learning, sets: Sequence[Examples], autoencoder: AnyCodec, cache: Path, accelerator: Accelerator
) -> list[Latents]:
    """The latents of each set, cached if the config says so; all processes together encode what is missing.

    The autoencoder is made ready in any case: what it encodes later must not depend on what was cached before.
    """
    make_ready(autoencoder, learning, accelerator.device)
    if not learning.cache:
        return [EncodedLatents(examples, autoencoder, learning.encode_dtype) for examples in sets]
    store = latents_store(learning, autoencoder, cache)
    for examples in sets:
        fill_latents(learning, store, examples, autoencoder, accelerator.device, _own_share(accelerator))
    _take_in_all(accelerator, store)
    return [CachedLatents(store, examples, autoencoder) for examples in sets]


def captions_of(
    learning: Learning,
    sets: Sequence[Examples],
    text_encoder: AnyEncoder | ClassLabels,
    cache: Path,
    accelerator: Accelerator,
    *,
    sized: bool = False,
) -> list[Captions]:
    """The captions of each set: token ids if the text encoder is trained, else conditions, which are cached unless tags
    are shuffled. A class has a label.
    """
    if isinstance(text_encoder, ClassLabels):
        return [Classes(examples, text_encoder) for examples in sets]
    if learning.tune_text_encoder:
        return [TokenIds(examples, _of_ids(text_encoder), sized=sized) for examples in sets]
    text_encoder.to(accelerator.device).requires_grad_(False)

    def uncached(examples: Examples) -> Captions:
        if isinstance(text_encoder, AnyTextEncoder):
            return EncodedCaptions(examples, text_encoder, sized=sized)
        if learning.training.num_workers and accelerator.device.type != "cpu":
            raise ConfigError("prompts that are not cached require num_workers = 0: workers cannot use a GPU")
        return EncodedPrompts(examples, text_encoder)

    if not learning.cache:
        return [uncached(examples) for examples in sets]
    captions = [examples.every_caption() for examples in sets]
    store = conditions_store(text_encoder, cache)
    for words in captions:
        fill_conditions(store, words or [], text_encoder, accelerator.device, _own_share(accelerator))
    _take_in_all(accelerator, store)
    return [
        uncached(examples) if words is None else CachedCaptions(store, examples, sized=sized)
        for examples, words in zip(sets, captions, strict=True)
    ]


def latents_store(learning: Learning, autoencoder: AnyCodec, cache: Path) -> Store:
    """The store of rows `mean` and `log_variance` of one autoencoder in one precision."""
    return Store(cache / f"latents-{identity_of(autoencoder)[:16]}-{learning.encode_dtype}")


def _of_ids(text_encoder: AnyEncoder) -> AnyTextEncoder:
    """Raises ConfigError for an encoder that cannot be trained."""
    if isinstance(text_encoder, AnyTextEncoder):
        return text_encoder
    raise ConfigError("the text encoder of this model cannot be trained: set finetune.tune_text_encoder=false")


def conditions_store(text_encoder: AnyEncoder, cache: Path) -> Store:
    """The store of rows `tokens`, and where there are any `pooled` and `mask`, of one text encoder."""
    return Store(cache / f"conditions-{identity_of(text_encoder)[:16]}")


def fill_latents(
    learning: Learning,
    store: Store,
    examples: Examples,
    autoencoder: AnyCodec,
    device: torch.device,
    share: Shard = ALL,
) -> int:
    """Encode what is missing of one share; returns the number. Raises DataError for non-finite latents."""
    views = ((row, view) for row in range(len(examples)) for view in examples.every_view(row))
    view_of = {examples.key(*item): item for item in views}
    missing = _shared(store.missing(view_of), share)
    missing.sort(key=lambda key: examples.pictures.size(view_of[key][0]))
    writer = _Writer(store, lambda images: _named_moments(learning, examples, autoencoder, device, images))
    items = [view_of[key] for key in missing]
    for number, pixels in tqdm(examples.pictures.each(items), "encoding", len(items), unit="image", disable=not items):
        writer.take(missing[number], items[number][0], examples.toned(pixels))
    writer.finish()
    return len(items)


def fill_conditions(
    store: Store, captions: Sequence[str], text_encoder: AnyEncoder, device: torch.device, share: Shard = ALL
) -> int:
    """Encode what is missing of one share, and the empty caption; returns the number."""
    words = {_key_of(caption): caption for caption in ("", *captions)}
    missing = _shared(store.missing(words), share)
    firsts = range(0, len(missing), ROWS_A_FILE)
    for first in tqdm(firsts, "encoding captions", unit="file", disable=not missing):
        some = missing[first : first + ROWS_A_FILE]
        texts = [words[key] for key in some]
        if isinstance(text_encoder, AnyTextEncoder):
            conditions = encoded(text_encoder, text_encoder.tokenize(texts).to(device))
        else:
            conditions = encoded_prompts(text_encoder, texts)
        store.add(some, {name: array.cpu() for name, array in conditions.arrays.items()})
    return len(missing)


class _Writer:
    """Encodes pictures of several shapes, AT_ONCE at a time, and writes them ROWS_A_FILE at a time."""

    def __init__(self, store: Store, encode: Callable[[list[_Taken]], list[_Moments]]):
        self._store, self._encode = store, encode
        self._taken: dict[tuple[int, ...], list[_Taken]] = {}
        self._rows: dict[tuple[int, ...], list[tuple[str, _Moments]]] = {}

    def take(self, key: str, row: int, pixels: np.ndarray) -> None:
        taken = self._taken.setdefault(pixels.shape, [])
        taken.append((key, row, pixels))
        if len(taken) == AT_ONCE:
            self._encode_taken(pixels.shape)

    def finish(self) -> None:
        for shape in self._taken:
            self._encode_taken(shape, last=True)

    def _encode_taken(self, shape: tuple[int, ...], last: bool = False) -> None:
        taken, rows = self._taken[shape], self._rows.setdefault(shape, [])
        if taken:
            rows += zip((key for key, _, _ in taken), self._encode(taken), strict=True)
            self._taken[shape] = []
        if rows and (last or len(rows) >= ROWS_A_FILE):
            means, log_variances = zip(*(moments for _, moments in rows), strict=True)
            tensors = {"mean": torch.stack(means), "log_variance": torch.stack(log_variances)}
            self._store.add([key for key, _ in rows], tensors)
            rows.clear()


def _named_moments(
    learning: Learning,
    examples: Examples,
    autoencoder: AnyCodec,
    device: torch.device,
    taken: list[_Taken],
) -> list[_Moments]:
    """Moments of some pictures on the CPU. Raises DataError."""
    dtype = learning.encode_dtype
    images = to_images(np.stack([pixels for _, _, pixels in taken])).to(device)
    mean, log_variance = moments_of(autoencoder, images, dtype)
    for good, (_, row, _) in zip(finite(mean, log_variance).tolist(), taken, strict=True):
        if not good:
            tried = dtype if dtype == "float32" else f"{dtype} and float32"
            raise DataError(f"VAE gave non-finite latents for {examples.pictures.name(row)} in {tried}")
    return list(zip(mean.cpu(), log_variance.cpu(), strict=True))


def _own_share(accelerator: Accelerator) -> Shard:
    return accelerator.process_index, accelerator.num_processes


def _take_in_all(accelerator: Accelerator, store: Store) -> None:
    accelerator.wait_for_everyone()
    store.refresh()


def _shared(keys: list[str], share: Shard) -> list[str]:
    """The keys of one share. Keys are hashes, so their remainders make equal shares for any number of jobs."""
    number, jobs = share
    return [key for key in keys if int(key[:8], 16) % jobs == number]


def _captions(examples: Examples, keys: Sequence[Key], kept: Sequence[bool]) -> list[str]:
    return [examples.caption(*key) if keep else "" for key, keep in zip(keys, kept, strict=True)]


def _sizes(examples: Examples, keys: Sequence[Key], sized: bool) -> dict[str, Tensor]:
    """SDXL's sizes of each sample, (B, 6): the original (height, width), the crop's (top, left), the target."""
    if not sized:
        return {}
    sizes = [examples.sizes(row, epoch) for row, epoch in keys]
    return {"sizes": torch.tensor(sizes, dtype=torch.float32)}


def _key_of(caption: str) -> str:
    return hashlib.sha256(caption.encode()).hexdigest()[:32]


def _shape_of(examples: Examples, autoencoder: AnyCodec) -> Callable[[int], tuple[int, ...]]:
    channels, factor = autoencoder.latent_channels, autoencoder.factor

    def shape(row: int) -> tuple[int, ...]:
        height, width = examples.pictures.size(row)
        return channels, height // factor, width // factor

    return shape
