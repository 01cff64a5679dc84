"""Calls written for diffusers' pipelines as our settings; unsupported arguments raise a ConfigError that names ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np

from latentdiff.core.arrays import Array, as_tensor
from latentdiff.core.errors import ConfigError
from latentdiff.diffusion.samplers import SAMPLERS, Step
from latentdiff.drawing.draw import Watch
from latentdiff.drawing.extras import LARGEST_WEIGHT
from latentdiff.drawing.latents import from_diffusers, to_diffusers
from latentdiff.drawing.request import LARGEST_BATCH
from latentdiff.model import Model

_OURS = {  # arguments of diffusers that are not taken -> what to use
    "callback": "callback_on_step_end, or stream",
    "callback_steps": "callback_on_step_end, or stream",
    "denoising_end": "load_refiner and refiner_switch, or strength with an image",
    "denoising_start": "load_refiner and refiner_switch, or strength with an image",
    "crops_coords_top_left": "crop",
    "target_size": "width and height",
    "negative_original_size": "original_size",
    "negative_crops_coords_top_left": "crop",
    "negative_target_size": "width and height",
    "masked_image_latents": "image and mask_image",
}


class Call(NamedTuple):
    """A call of diffusers' as our settings, and what it asks for beside them.

    adapters: a factor of the adapters' weights. masks: of the IP-Adapters. callback: called after each step.
    """

    settings: dict[str, Any]
    as_tuple: bool = False
    adapters: float = 1.0
    callback: Callable[..., Any] | None = None
    masks: Any = None


def translated(settings: Mapping[str, Any]) -> Call:
    """The settings of a call without those that only diffusers has. Raises ConfigError."""
    rest = dict(settings)
    for name, ours in _OURS.items():
        if rest.pop(name, None) is not None:
            raise ConfigError(f"{name} is not taken: use {ours}")
    callback = rest.pop("callback_on_step_end", None)
    wanted = rest.pop("callback_on_step_end_tensor_inputs", None)
    if wanted is not None and (not isinstance(wanted, list | tuple) or list(wanted) != ["latents"]):
        raise ConfigError(f'callback_on_step_end_tensor_inputs can be ["latents"] only (got {str(wanted)[:60]})')
    if callback is not None and not callable(callback):
        raise ConfigError(f"callback_on_step_end must be a function (got {str(callback)[:40]!r})")
    scale, masks = _attention(rest.pop("cross_attention_kwargs", None))
    return Call(rest, rest.pop("return_dict", True) is False, scale, callback, masks)


def _attention(kwargs: Any) -> tuple[float, Any]:
    """The scale of the adapters, and the masks of image prompts. Raises ConfigError for anything else."""
    if not kwargs:
        return 1.0, None
    if not isinstance(kwargs, Mapping) or not kwargs.keys() <= {"scale", "ip_adapter_masks"}:
        names = "a scale of the adapters and ip_adapter_masks only"
        raise ConfigError(f"cross_attention_kwargs can be {names} (got {str(kwargs)[:60]})")
    scale = kwargs.get("scale", 1.0)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) <= LARGEST_WEIGHT:
        most = f"a number up to {LARGEST_WEIGHT:g}"
        raise ConfigError(f"cross_attention_kwargs: scale must be {most} (got {str(scale)[:40]!r})")
    return float(scale), kwargs.get("ip_adapter_masks")


def classes(settings: dict[str, Any], prompt: Any, model: Model) -> Any:
    """The prompts, or in their place `class_labels`, numbers, as diffusers' DiTPipeline has. Raises ConfigError."""
    labels = settings.pop("class_labels", None)
    if labels is None:
        return prompt
    if prompt is not None:
        raise ConfigError("class_labels replace the prompt: give only one of them")
    if set(model.backbone.spec.reads) != {"label"}:
        raise ConfigError("class_labels require a model that draws classes")
    listed = labels.tolist() if hasattr(labels, "tolist") else labels
    if not isinstance(listed, list | tuple) or not all(type(label) is int for label in listed):
        raise ConfigError(f"class_labels must be a list of whole numbers (got {str(labels)[:40]!r})")
    return [str(label) for label in listed]


def each_weight(path: Any, subfolder: Any, name: Any) -> list[tuple[Any, str, str | None]]:
    """Path, subfolder and weight_name of each adapter; a single one is for all. Raises ConfigError."""
    listed = [list(one) if isinstance(one, list | tuple) else [one] for one in (path, subfolder, name)]
    count = max(map(len, listed))
    for wanted, values in zip(("subfolder", "weight_name"), listed[1:], strict=True):
        if not all(each is None or isinstance(each, str) for each in values):
            raise ConfigError(f"{wanted} must be text")
    if any(len(one) not in (1, count) for one in listed):
        raise ConfigError("path, subfolder and weight_name must have one length")
    return list(zip(*(one * count if len(one) == 1 else one for one in listed), strict=True))


def batch_of_one_generator(settings: Mapping[str, Any], generator: Any, prompts: int, each: Any) -> dict[str, Any]:
    """One generator draws for all pictures, step by step: as one batch, like in diffusers."""
    if generator is None or isinstance(generator, list | tuple) or not isinstance(each, Integral):
        return {}
    given = settings.get("batch_size", 1)
    if not isinstance(given, Integral):  # the request refuses it
        return {}
    return {"batch_size": max(int(given), min(prompts * int(each), LARGEST_BATCH))}


def second_prompts(settings: dict[str, Any], prompt: Any, negative: Any) -> None:
    """Drop `prompt_2` and `negative_prompt_2` that repeat the first ones: both encoders read one prompt here.

    Raises ConfigError for other ones.
    """
    for name, first in (("prompt_2", prompt), ("negative_prompt_2", negative)):
        other = settings.pop(name, None)
        if other is not None and other != first:
            raise ConfigError(f"{name} is not taken: both text encoders read the same prompt")


def negatives(negative: Any, count: int) -> list[str]:
    """A negative prompt for each of `count` prompts, from one or a list. Raises ConfigError."""
    if negative is None or isinstance(negative, str):
        return [negative or ""] * count
    listed = list(negative) if isinstance(negative, Sequence) else []
    if len(listed) not in (1, count) or not all(isinstance(each, str) for each in listed):
        raise ConfigError(f"negative_prompt must be text, or a text for each of {count} prompts")
    return listed * count if len(listed) == 1 else listed


def picture(image: Any) -> Any:
    """An input picture: tensors and floats in [0, 1], (1, 3, H, W), (3, H, W) or (H, W, 3), become uint8 (H, W, 3).

    Others are returned as they are. Raises ConfigError for several pictures and for floats outside [0, 1].
    """
    image = _single(image, "image")
    values = _floats(image, "image", 3)
    if values is None:
        return image
    return np.rint(255 * (values.transpose(1, 2, 0) if values.shape[-1] != 3 else values)).astype(np.uint8)


def pictures(images: Any) -> Any:
    """One picture or a list of pictures; see `picture`."""
    if isinstance(images, list | tuple):
        return [pictures(image) for image in images]
    return picture(images)


def mask(image: Any) -> Any:
    """A mask: tensors and floats in [0, 1], (1, 1, H, W), (1, H, W) or (H, W), become uint8 (H, W)."""
    image = _single(image, "mask_image")
    values = _floats(image, "mask_image", 2)
    return image if values is None else np.rint(255 * values).astype(np.uint8)


def _single(image: Any, name: str) -> Any:
    if isinstance(image, list | tuple) and image and hasattr(image[0], "size"):  # PIL images or arrays
        if len(image) > 1:
            raise ConfigError(f"{name} must be one picture; a call draws over one (got {len(image)})")
        return image[0]
    return image


def _floats(image: Any, name: str, dimensions: int) -> np.ndarray | None:
    """Values in [0, 1] of an array or a tensor of floats, without axes of length 1 in front; None for other things."""
    tensor = hasattr(image, "detach")
    if not tensor and not isinstance(image, np.ndarray):
        return None
    if tensor and (image.is_meta or image.is_sparse or not image.is_floating_point()):
        return None
    array = image.detach().float().cpu().numpy() if tensor else image
    if array.dtype.kind != "f":
        return None
    while array.ndim > dimensions and array.shape[0] == 1:
        array = array[0]
    if array.ndim != dimensions or (dimensions == 3 and 3 not in (array.shape[0], array.shape[-1])):
        return None
    if not array.size:
        return None
    if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
        raise ConfigError(f"{name} of floats must be in [0, 1]")
    return np.asarray(array)


def watching(call: Call, pipeline: Any, sampler: str, starts: Sequence[float]) -> Watch | None:
    """The caller's callback for `drawing.draw`: (pipeline, step, time, {"latents": ...}) -> changes, as in diffusers.

    Solvers that diffusers writes in x / alpha show such latents, on variance-preserving paths only. starts: the
    time at which each step starts.
    """
    callback = call.callback
    if callback is None:
        return None
    model, count = pipeline.model, 0
    divided = SAMPLERS[sampler].by_ratio and model.path.has_integer_times

    def watch(step: Step) -> Array | None:
        nonlocal count
        number = count % len(starts)
        count += 1
        scale = step.level.alpha if divided and step.level.alpha > 0 else 1.0
        seen = as_tensor(to_diffusers(model, step.x)) / scale
        before = seen.clone()
        changes = callback(pipeline, number, starts[number], {"latents": seen})
        latents = changes.get("latents", seen) if isinstance(changes, Mapping) else seen
        if getattr(latents, "shape", None) != before.shape or not latents.is_floating_point():
            raise ConfigError(f"callback_on_step_end must return latents like those it gets, {tuple(before.shape)}")
        if bool((latents == before).all()):
            return None
        return model.array(from_diffusers(model, latents, tuple(step.x.shape)) * scale)

    return watch


_WITHOUT_EFFECT = {  # arguments of diffusers' from_pretrained -> the values that mean what is done here
    "safety_checker": (None,),
    "requires_safety_checker": (None, False),
    "feature_extractor": (None,),
    "image_encoder": (None,),
    "use_safetensors": (None, True),
    "low_cpu_mem_usage": (None, True, False),
    "add_watermarker": (None, False),
    "local_files_only": (None, False),
    "force_download": (None, False),
    "trust_remote_code": (None, False),
}


def loading_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The parts among the arguments of diffusers' `from_pretrained`: scheduler, vae, controlnet.

    Arguments that ask for what is done here anyway are accepted. Raises ConfigError for others.
    """
    parts = {}
    for name, value in options.items():
        if name in ("scheduler", "vae", "controlnet"):
            parts[name] = value
        elif name not in _WITHOUT_EFFECT:
            known = "device, torch_dtype, variant, revision, runtime, speed, quantize, scheduler, vae, controlnet"
            raise ConfigError(f"from_pretrained has no {name}. It has {known}")
        elif not any(value is usual for usual in _WITHOUT_EFFECT[name]):
            raise ConfigError(f"{name}={str(value)[:40]} is not taken")
    return parts
