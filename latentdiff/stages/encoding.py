"""Frozen networks applied to pictures and captions, with the same bits before training and in its steps.

Kernels round differently for other numbers of rows and other memory orders. So rows are contiguous and go through in
full batches of `AT_ONCE`; then the other rows of a batch change no bit, and cached rows equal those that a step would
compute. The arithmetic is float32 by default, whatever the training's is, and the results are rounded to
half precision.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from latentdiff.families.weights import weights_hash
from latentdiff.networks.codecs.autoencoder import Autoencoder
from latentdiff.networks.codecs.identity import IdentityCodec
from latentdiff.networks.conditions import Conditions, stacked
from latentdiff.networks.encoders.chat import ChatText
from latentdiff.networks.encoders.clip import TextEncoder
from latentdiff.networks.encoders.clip_and_t5 import ClipAndT5
from latentdiff.networks.encoders.prompt import Prompt, Style
from latentdiff.networks.encoders.three_texts import ThreeTextEncoders
from latentdiff.networks.encoders.two_clips import TwoTextEncoders

AT_ONCE = 8
AnyTextEncoder = TextEncoder | TwoTextEncoders  # of token ids
AnyEncoder = TextEncoder | TwoTextEncoders | ThreeTextEncoders | ClipAndT5 | ChatText
AnyCodec = Autoencoder | IdentityCodec
_NOT_ITS_OWN = ("transformers_version", "dtype", "torch_dtype", "architectures")


def in_batches(function: Callable[[Tensor], tuple[Tensor, ...]], rows: Tensor) -> tuple[Tensor, ...]:
    """function(rows), tensors (B, ...), computed AT_ONCE rows at a time."""
    parts = []
    for part in torch.split(rows, AT_ONCE):
        lacking = AT_ONCE - len(part)
        filled = torch.cat([part, part.new_zeros(lacking, *part.shape[1:])]) if lacking else part
        parts.append([tensor[: len(part)] for tensor in function(filled.contiguous())])
    return tuple(torch.cat(tensors).contiguous() for tensors in zip(*parts, strict=True))


@torch.no_grad()
def moments_of(autoencoder: AnyCodec, images: Tensor, dtype: str = "float32") -> tuple[Tensor, Tensor]:
    """Posterior mean and log-variance (B, C, h, w) of images (B, 3, H, W), in half precision.

    Rows that are not finite in a narrower `dtype` are computed again in float32; see `finite`.
    """
    mean, log_variance = _moments(autoencoder, images, dtype)
    if dtype != "float32" and not (good := finite(mean, log_variance)).all():
        mean[~good], log_variance[~good] = _moments(autoencoder, images[~good], "float32")
    return mean, log_variance


def _moments(autoencoder: AnyCodec, images: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    kind = images.device.type
    narrow = torch.autocast(kind, getattr(torch, dtype), enabled=dtype != "float32")
    with torch.autocast(kind, enabled=False), narrow:
        mean, log_variance = in_batches(autoencoder.encode, images)
    return mean.half(), log_variance.half()


def finite(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Whether each row (B,) has a finite mean and a variance that is finite; a log-variance may be minus infinity."""
    good = mean.isfinite() & ~log_variance.isnan() & ~log_variance.isposinf()
    return good.flatten(1).all(1)


def identity_of(network: AnyCodec | AnyEncoder) -> str:
    """sha256 of everything that a network's results depend on: weights, config, and a text encoder's tokenizer."""
    parts = [weights_hash(network)]
    if isinstance(network, TextEncoder | TwoTextEncoders):
        for encoder in network.encoders:
            parts += [_settings(encoder.model.config.to_dict()), encoder.tokenizer_json(), str(encoder.length)]
    elif isinstance(network, AnyEncoder):
        parts += [f"{type(network).__name__} {network.length}", _words_of(network)]
    elif isinstance(network, Autoencoder):
        parts.append(_settings(dict(network.vae.config)))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _words_of(network: AnyEncoder) -> str:
    """The vocabularies of an encoder's tokenizers, and how it reads a prompt."""
    own = [getattr(network, name, None) for name in ("first", "second", "third")]
    tokenizers = [each.tokenizer for each in own if each is not None] or [network.tokenizer]
    words = [json.dumps(sorted(each.get_vocab().items())) for each in tokenizers]
    return "\n".join([*words, repr(getattr(network, "chat", ""))])


def _settings(config: dict[str, Any]) -> str:
    """A network's config without the path and the version that it was loaded with."""
    return json.dumps(
        {key: value for key, value in sorted(config.items()) if key[0] != "_" and key not in _NOT_ITS_OWN}
    )


def encoded_prompts(encoder: AnyEncoder, captions: Sequence[str]) -> Conditions:
    """The conditions of captions, in half precision: without weights of words, cut to the encoder's length."""
    plain = Style(weights=False, chunked=False)
    return stacked([encoder.encode(Prompt(caption, plain)) for caption in captions]).mapped(lambda array: array.half())


@torch.no_grad()
def encoded(text_encoder: AnyTextEncoder, ids: Tensor) -> Conditions:
    """The conditions of token ids (B, L), or (B, 2, L) for two encoders, in half precision."""
    names: list[str] = []

    def tensors(part: Tensor) -> tuple[Tensor, ...]:
        conditions: Conditions = text_encoder(part)
        names[:] = conditions.arrays
        return tuple(conditions.arrays.values())

    with torch.autocast(ids.device.type, enabled=False):
        arrays = in_batches(tensors, ids)
    return Conditions(dict(zip(names, arrays, strict=True))).cast(torch.float16)
