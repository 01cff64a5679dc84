"""Networks that enlarge a picture in one evaluation, like ESRGAN and SwinIR: read and computed by spandrel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from latentdiff.core.errors import ConfigError, ModelError, NonFiniteError, loading
from latentdiff.core.images import coloured, luminance, to_images, to_uint8
from latentdiff.core.turn import Turn


class Upscaler(nn.Module):
    """Pictures -> pictures `scale` times as large."""

    def __init__(self, described: Any):
        super().__init__()
        self._described, self.model, self._turn = described, described.model, Turn()
        self.scale = int(described.scale)

    @torch.no_grad()
    def enlarge(self, pictures: np.ndarray) -> np.ndarray:
        """uint8 (B, H, W, 3) -> uint8 (B, sH, sW, 3), each picture by itself."""
        weight = next(self.model.parameters())
        grey = self._described.input_channels == 1
        rows = []
        for picture in pictures:
            values = to_images((luminance(picture) if grey else picture)[None]).to(weight.device, weight.dtype)
            with self._turn:
                enlarged = self._described((values + 1) / 2)  # which pads and crops as the network requires
            if not bool(enlarged.isfinite().all()):
                raise NonFiniteError("the upscaler gave non-finite numbers")
            rows.append(to_uint8(2 * enlarged.float().cpu() - 1))
        return coloured(np.concatenate(rows))


def load_upscaler(file: Path) -> Upscaler:
    """The upscaler of a .safetensors file, in float32 on the CPU. Raises ConfigError, ModelError."""
    try:
        from spandrel import ImageModelDescriptor, ModelLoader
    except ImportError:
        raise ConfigError("upscalers require spandrel: pip install 'latentdiff[upscale]'") from None
    from safetensors.torch import load_file

    with loading(file):
        described = ModelLoader("cpu").load_from_state_dict(load_file(file))
        if not isinstance(described, ImageModelDescriptor) or described.purpose != "SR":
            raise ModelError(f"not an upscaler: {type(described).__name__} for {described.purpose} ({file})")
        if described.input_channels not in (1, 3) or described.output_channels not in (1, 3) or described.scale < 2:
            raise ModelError(
                "an upscaler must read and write 1 or 3 channels and have a scale of at least 2"
                f" (got {described.input_channels} channels, scale {described.scale}: {file})"
            )
        return Upscaler(described).float().eval()
