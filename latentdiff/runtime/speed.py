"""Speeds of torch's networks: `exact`, `fast` or `max`.

    exact   unchanged networks, operation by operation
    fast    same precision, other order of sums: channels last, one product for queries, keys and values, the text's
            keys and values once a picture, the backbone compiled (on a GPU only its repeated blocks, in seconds)
    max     like fast, in 16 bits by default: the whole backbone and the decoder compiled, on a GPU with tuned kernels
            and CUDA graphs

Change the modules of a faster model only with the pipeline's methods: fused projections and cached prompts do not
notice other changes.

Compilation takes a minute for each new size or number of pictures of a process, less with torch's own cache.
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
from latentdiff.networks.layout import lay_out
from latentdiff.runtime.quantized import is_quantized

_GPU_MODE = "max-autotune"


def narrow_dtype(device: torch.device) -> torch.dtype:
    """The 16-bit precision of a device: bfloat16, or float16 on GPUs without bfloat16."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def sped_up(model: Model, speed: Literal["fast", "max"]) -> Model:
    """The model with faster modules, which are changed in place; `slowed_down` undoes it."""
    warnings.filterwarnings("ignore", "Dynamo detected a call", UserWarning)  # about a cache of transformers
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # that there is no GPU
    gpu = model.place.device.type == "cuda"
    if isinstance(model.backbone, UNet):
        lay_out(model.backbone)
        if not is_quantized(model):  # quantized weights would be widened, or cannot be joined
            model.backbone.fuse()
        if gpu and speed == "fast":
            model.backbone.model.compile_repeated_blocks(fullgraph=True)
        else:
            model.backbone.model.compile(mode=_GPU_MODE if gpu else None)
    if isinstance(model.codec, Autoencoder):
        lay_out(model.codec)
        if speed == "max":
            model.codec.vae.decoder.compile(mode=_GPU_MODE if gpu else None)
    return replace(model, speed=speed)


def slowed_down(model: Model) -> Model:
    """Undo `sped_up`, so that the modules can be changed; the order of weights in memory stays."""
    if isinstance(model.backbone, UNet):
        model.backbone.unfuse()
    backbone, _, codec = model.modules()
    for module in [*backbone.modules(), *codec.modules()]:
        module._compiled_call_impl = None  # Module.compile sets it, and nothing in torch unsets it
    return replace(model, speed="exact")
