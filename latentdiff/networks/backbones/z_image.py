"""The transformer of Z-Image (Alibaba 2025): diffusers.ZImageTransformer2DModel, in which one stream holds the tokens
of the picture and of the prompt.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF
from torch import Tensor

from latentdiff.networks.backbones.transformer import Transformer
from latentdiff.networks.conditions import Conditions
from latentdiff.networks.protocols import Spec


class ZImage(Transformer):
    """It reads `tokens` (B, L, D) of the prompt, those that `mask` (B, L) marks if there is one."""

    masked = True

    @property
    def spec(self) -> Spec:
        """See Spec."""
        config = self.model.config
        channels = int(config.in_channels)
        reads = {"tokens": (None, int(config.cap_feat_dim))}
        return Spec(channels, channels, int(config.all_patch_size[0]), reads)

    def output(self, x: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """See Transformer. The module's time runs from 0, noise, to 1, and it predicts x0 - noise."""
        output: list[Tensor] = self.model(
            list(x.unsqueeze(2)), 1 - time / 1000, _marked(conditions), return_dict=False
        )[0]
        return -torch.stack(output).squeeze(2)

    @property
    def clock(self) -> tuple[float, float]:
        """See Transformer: the module's own time, from noise on. The library would compute the sum in 16 bits."""
        return -self.model.t_scale / 1000, float(self.model.t_scale)

    def _function(self, x: Tensor, time: Tensor, **arrays: Tensor) -> Tensor:
        """See Transformer: the module's forward with masks for its lists of different lengths."""
        model, (tokens, mask) = self.model, (arrays["tokens"], arrays["mask"])
        rows, channels, height, width = (x.shape[axis] for axis in range(4))
        patch = self.spec.multiple
        down, across = height // patch, width // patch
        name = f"{patch}-1"
        adaln = model.t_embedder(time.expand(rows))

        length = _padded_length(mask.sum(1).long())  # of each prompt with its padding, (B,)
        words = torch.arange(tokens.shape[1])
        known, ones = words < length[:, None], torch.zeros_like(words)
        text = torch.where(mask[..., None] > 0, model.cap_embedder(tokens), model.cap_pad_token)
        text_turns = _rotations(model, [words + 1, ones, ones]).expand(rows, -1, -1, -1)
        for layer in model.context_refiner:
            text = layer(text, known, torch.view_as_complex(text_turns))

        patches = x.reshape(rows, channels, down, patch, across, patch).permute(0, 2, 4, 3, 5, 1)
        picture = model.all_x_embedder[name](patches.reshape(rows, down * across, channels * patch**2))
        count = down * across
        all_places = torch.arange(_padded_length(count))
        padded, places = all_places >= count, all_places.clamp(max=count - 1)
        picture = torch.where(padded[:, None], model.x_pad_token, picture[:, places])
        axes = [length[:, None] + 1, *(each.expand(rows, -1) for each in (places // across, places % across))]
        turns = _rotations(model, [torch.where(padded, 0, axis) for axis in axes])
        for layer in model.noise_refiner:
            picture = layer(picture, None, torch.view_as_complex(turns), adaln)

        joined, known = torch.cat([picture, text], 1), torch.cat([torch.ones_like(padded).expand(rows, -1), known], 1)
        for layer in model.layers:
            joined = layer(joined, known, torch.view_as_complex(torch.cat([turns, text_turns], 1)), adaln)
        output = model.all_final_layer[name](joined, c=adaln)[:, :count]
        pixels = output.reshape(rows, down, across, patch, patch, channels).permute(0, 5, 1, 3, 2, 4)
        return -pixels.reshape(rows, channels, height, width)


def _padded_length(length: Any) -> Any:
    """A number of tokens, rounded up to the multiple that padding fills."""
    return (length + SEQ_MULTI_OF - 1) // SEQ_MULTI_OF * SEQ_MULTI_OF


def _rotations(model: Any, axes: list[Tensor]) -> Tensor:
    """The rotations of places, (..., D / 2, 2): cosine and sine."""
    embedder = model.rope_embedder
    tables = embedder.precompute_freqs_cis(embedder.axes_dims, embedder.axes_lens, embedder.theta)
    return torch.cat([torch.view_as_real(table)[axis] for table, axis in zip(tables, axes, strict=True)], -2)


def _marked(conditions: Conditions) -> list[Any]:
    """The tokens of each prompt, (L', D)."""
    mask, tokens = conditions.get("mask"), list(conditions["tokens"])
    return tokens if mask is None else [rows[marks.bool()] for rows, marks in zip(tokens, mask, strict=True)]
