"""Networks that enlarge a picture in one evaluation, like ESRGAN and SwinIR, from the files that spandrel reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from latentdiff.core.errors import ModelError
from latentdiff.formats.pickle import check_safetensors

if TYPE_CHECKING:
    from latentdiff.networks.upscaler import Upscaler


def load_upscaler(file: Path) -> Upscaler:
    """The upscaler of a .safetensors file, in float32 on the CPU. Raises ConfigError, ModelError, UnsafeError."""
    from latentdiff.networks import upscaler

    if not file.is_file():
        raise ModelError(f"no such file ({file}). An upscaler is a .safetensors file")
    check_safetensors(file, ". `latentdiff convert --trust-pickle` converts it")
    return upscaler.load_upscaler(file)
