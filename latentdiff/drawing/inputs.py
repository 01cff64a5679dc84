"""Checks of the inputs beside a request, before anything is computed: prompts, noise, embeddings, margins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from latentdiff.core.arrays import Put
from latentdiff.core.errors import ConfigError
from latentdiff.drawing.batch import NO_NOISE, CallerNoise
from latentdiff.drawing.request import LONGEST

if TYPE_CHECKING:
    from latentdiff.drawing.canvas import Margins
    from latentdiff.networks.conditions import Conditions

Shape = tuple[int, ...]


def prompts_of(prompt: str | Sequence[str] | None) -> list[str]:
    """One prompt or several as a list. Raises ConfigError for an empty list, or for anything but text."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt) if isinstance(prompt, Sequence) else []
    if not prompts or not all(isinstance(one, str) for one in prompts):
        got = "an empty list" if prompt == [] else repr(str(prompt)[:40])
        raise ConfigError(f"prompt must be text or a list of texts (got {got})")
    return prompts


def margins_of(outpaint: Any) -> Margins:
    """Pixels on the left, top, right and bottom. Raises ConfigError for anything else."""
    from latentdiff.drawing.canvas import NONE, Margins

    if outpaint is None:
        return NONE
    whole = isinstance(outpaint, Sequence) and len(outpaint) == 4
    if not whole or not all(type(side) is int and 0 <= side <= LONGEST for side in outpaint):
        raise ConfigError(f"outpaint must be (left, top, right, bottom) pixels from 0 to {LONGEST} (got {outpaint})")
    if not any(outpaint):
        raise ConfigError("outpaint must add at least one pixel")
    return Margins(*outpaint)


def embeds_of(
    tokens: Any, negative: Any, pooled: Any, negative_pooled: Any, *, width: int, with_pooled: bool
) -> list[tuple[Conditions, Conditions | None]]:
    """The caller's own conditions, one pair for each prompt that they replace; an empty list without `tokens`.

    tokens, negative: (B, L, D), D = `width`; pooled: (B, P), for a network that reads them. Raises ConfigError.
    """
    tensors = [tokens, negative, pooled, negative_pooled]
    if tokens is None:
        if any(tensor is not None for tensor in tensors):
            raise ConfigError("negative_prompt_embeds and pooled embeds require prompt_embeds")
        return []
    import torch

    tensors = [torch.from_numpy(tensor) if isinstance(tensor, np.ndarray) else tensor for tensor in tensors]
    tokens, negative, pooled, negative_pooled = tensors
    for tensor, dimensions in zip(tensors, (3, 3, 2, 2), strict=True):
        known = isinstance(tensor, torch.Tensor) and tensor.ndim == dimensions and len(tensor) == len(tokens)
        if tensor is not None and not known:
            raise ConfigError("prompt_embeds must be tensors (B, L, D), pooled embeds (B, P), all with the same B")
        if tensor is not None and (tensor.is_meta or not tensor.is_floating_point()):
            raise ConfigError("prompt_embeds must be floating-point numbers")
    if tokens.shape[-1] != width:
        raise ConfigError(f"prompt_embeds must have {width} numbers a token (got {tokens.shape[-1]})")
    if negative is not None and negative.shape != tokens.shape:
        raise ConfigError(f"prompt_embeds are {tuple(tokens.shape)}, negative_prompt_embeds {tuple(negative.shape)}")
    if (pooled is not None) != with_pooled or (negative_pooled is not None) != (with_pooled and negative is not None):
        raise ConfigError(
            "a model that reads pooled text requires pooled embeds, one with each of the others; others take none"
        )
    rows: list[Any] = [[None] * len(tokens) if tensor is None else list(tensor) for tensor in tensors]
    return [
        (_conditions(cond, vector), None if uncond is None else _conditions(uncond, uncond_vector))
        for cond, uncond, vector, uncond_vector in zip(*rows, strict=True)
    ]


def _conditions(tokens: Any, pooled: Any) -> Conditions:
    from latentdiff.networks.conditions import Conditions

    return Conditions({"tokens": tokens} | ({} if pooled is None else {"pooled": pooled}))


def noise_of(latents: Any, generator: Any, shape: Shape, put: Put) -> CallerNoise:
    """The caller's own noise: `latents` of this shape, (N, C, h, w), and generators, one or N. Raises ConfigError."""
    if latents is None and generator is None:
        return NO_NOISE
    if generator is None and isinstance(latents, np.ndarray) and latents.shape == shape and latents.dtype == np.float32:
        return CallerNoise(put(latents))
    import torch

    listed = generator if isinstance(generator, list | tuple) else [generator]
    generators = None if generator is None else list(listed)
    if generators is not None and not all(isinstance(one, torch.Generator) for one in generators):
        raise ConfigError(f"generator must be a torch.Generator, or a list of them (got {type(generator).__name__})")
    if generators is not None and len(generators) not in (1, shape[0]):
        raise ConfigError(f"{len(generators)} generators for {shape[0]} pictures")
    if latents is None:
        return CallerNoise(None, generators)
    try:
        own = torch.as_tensor(latents).float()
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(f"latents must be a tensor of shape {shape} (got {type(latents).__name__})") from None
    if tuple(own.shape) != shape:
        raise ConfigError(f"latents must have the shape {shape} (got {tuple(own.shape)})")
    return CallerNoise(put(own), generators)
