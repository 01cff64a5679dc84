"""How far torch's networks are changed to be faster: `exact`, `fast` or `max`.

    exact   nothing is: operations run one by one, in the order and the precision in which they are written
    fast    same precision, other order of sums: channels last, one product for queries, keys and values, those of the
            text once a picture, and the U-Net compiled; on a GPU its repeated blocks alone, in seconds
    max     as fast, in 16 bits unless told otherwise: the whole U-Net and the decoder compiled, on a GPU with kernels
            that are tried out and launched as CUDA graphs

Faster networks must be changed by the pipeline's own methods only: of what is done to their modules past it, fused
projections and texts that were encoded before know nothing.

Compiling takes a minute for a new size or number of pictures, once a process, and less with torch's own cache.
"""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Literal

import torch

from latentdiff.networks.codecs.kl import Autoencoder

if TYPE_CHECKING:
    from latentdiff.pipeline import LatentDiffusionPipeline

Speed = Literal["exact", "fast", "max"]
_GPU_MODE = "max-autotune"


def narrow_dtype(device: torch.device) -> torch.dtype:
    """The 16 bits that a device computes in: bfloat16, or float16 on GPUs that have no other."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def speed_up(pipe: LatentDiffusionPipeline, speed: Literal["fast", "max"]) -> None:
    """Change the networks of a pipeline; `slow_down` undoes it."""
    warnings.filterwarnings("ignore", "Dynamo detected a call", UserWarning)  # of how the networks' library caches
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # that there is no GPU
    gpu = pipe.device.type == "cuda"
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.unet.fuse()
    if gpu and speed == "fast":
        pipe.unet.model.compile_repeated_blocks(fullgraph=True)
    else:
        pipe.unet.model.compile(mode=_GPU_MODE if gpu else None)
    if isinstance(pipe.autoencoder, Autoencoder):
        pipe.autoencoder.to(memory_format=torch.channels_last)
        if speed == "max":
            pipe.autoencoder.vae.decoder.compile(mode=_GPU_MODE if gpu else None)


def slow_down(pipe: LatentDiffusionPipeline) -> None:
    """The networks as they were written, so that others may be put into them; their weights' order in memory stays."""
    pipe.unet.unfuse()
    modules = [*pipe.unet.modules(), *pipe.autoencoder.modules()]
    for module in modules:
        module._compiled_call_impl = None  # what Module.compile sets, and nothing unsets
