"""How far torch's networks are changed to be faster: `exact`, `fast` or `max`.

    exact   unchanged: operations run one by one, in the order and the precision in which they are written
    fast    same precision, sums in another order: channels last, one product for queries, keys and values, the text's
            keys and values once a picture, the backbone compiled; on a GPU only its repeated blocks, in seconds
    max     as fast, in 16 bits by default: the whole backbone and the decoder compiled, on a GPU with kernels that are
            tuned and launched as CUDA graphs

Change the modules of a faster model only through the pipeline's methods: fused projections and cached prompts do not
notice other changes.

Compiling takes a minute for a new size or number of pictures, once a process, and less with torch's own cache.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace
from typing import Literal

import torch

from latentdiff.model import Model
from latentdiff.networks.backbones.unet import UNet
from latentdiff.networks.codecs.autoencoder import Autoencoder

_GPU_MODE = "max-autotune"


def narrow_dtype(device: torch.device) -> torch.dtype:
    """The 16 bits that a device computes in: bfloat16, or float16 on GPUs that have no other."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def sped_up(model: Model, speed: Literal["fast", "max"]) -> Model:
    """A model whose modules are changed; `slowed_down` undoes it."""
    warnings.filterwarnings("ignore", "Dynamo detected a call", UserWarning)  # about how the networks' library caches
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # says that there is no GPU
    gpu = model.place.device.type == "cuda"
    if isinstance(model.backbone, UNet):
        model.backbone.to(memory_format=torch.channels_last)
        model.backbone.fuse()
        if gpu and speed == "fast":
            model.backbone.model.compile_repeated_blocks(fullgraph=True)
        else:
            model.backbone.model.compile(mode=_GPU_MODE if gpu else None)
    if isinstance(model.codec, Autoencoder):
        model.codec.to(memory_format=torch.channels_last)
        if speed == "max":
            model.codec.vae.decoder.compile(mode=_GPU_MODE if gpu else None)
    return replace(model, speed=speed)


def slowed_down(model: Model) -> Model:
    """The networks as they were written, ready for changes; the order of their weights in memory stays."""
    if isinstance(model.backbone, UNet):
        model.backbone.unfuse()
    backbone, _, codec = model.modules()
    for module in [*backbone.modules(), *codec.modules()]:
        module._compiled_call_impl = None  # set by Module.compile, and never unset by torch
    return replace(model, speed="exact")
