"""Networks that are not trained any more, applied to pictures and captions: the same bits before training and in it.

Kernels round otherwise for another number of rows or another order in memory. So rows go through contiguous, in batches
of `AT_ONCE`, filled up where there are fewer; which rows share a batch then changes no bit, and what is cached is what
would be computed in a step. The arithmetic is float32 unless asked otherwise, whatever the training's is, and the
results are rounded to half.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from latentdiff.families.weights import weights_hash
from latentdiff.networks.codecs.autoencoder import Autoencoder
from latentdiff.networks.codecs.identity import IdentityCodec
from latentdiff.networks.codecs.kl import KLAutoencoder
from latentdiff.networks.codecs.tiny import TinyAutoencoder
from latentdiff.networks.conditions import Conditions
from latentdiff.networks.encoders.clip import TextEncoder
from latentdiff.networks.encoders.two_clips import TwoTextEncoders

AT_ONCE = 8
AnyTextEncoder = TextEncoder | TwoTextEncoders
AnyCodec = KLAutoencoder | TinyAutoencoder | IdentityCodec
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
    """Whether each row (B,) can be learnt from. A variance of zero can: a log-variance of minus infinity."""
    good = mean.isfinite() & ~log_variance.isnan() & ~log_variance.isposinf()
    return good.flatten(1).all(1)


def identity_of(network: AnyCodec | AnyTextEncoder) -> str:
    """sha256 of all that its results depend on: weights, configuration, and the tokenizer of a text encoder."""
    parts = [weights_hash(network)]
    if isinstance(network, TextEncoder | TwoTextEncoders):
        for encoder in network.encoders:
            parts += [_settings(encoder.model.config.to_dict()), encoder.tokenizer_json(), str(encoder.length)]
    elif isinstance(network, Autoencoder):
        parts.append(_settings(dict(network.vae.config)))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _settings(config: dict[str, Any]) -> str:
    """Of a network's config what is its own: not where it was loaded from, nor by which version."""
    return json.dumps(
        {key: value for key, value in sorted(config.items()) if key[0] != "_" and key not in _NOT_ITS_OWN}
    )


@torch.no_grad()
def encoded(text_encoder: AnyTextEncoder, ids: Tensor) -> Conditions:
    """The conditions of token ids (B, L), of two encoders (B, 2, L), in half precision."""
    names: list[str] = []

    def tensors(part: Tensor) -> tuple[Tensor, ...]:
        conditions: Conditions = text_encoder(part)
        names[:] = conditions.arrays
        return tuple(conditions.arrays.values())

    with torch.autocast(ids.device.type, enabled=False):
        arrays = in_batches(tensors, ids)
    return Conditions(dict(zip(names, arrays, strict=True))).cast(torch.float16)
