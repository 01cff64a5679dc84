"""The pictures that IP-Adapters show beside the prompt, as conditions of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from latentdiff.core.arrays import Array, Put, library
from latentdiff.core.errors import ConfigError, raised_as
from latentdiff.drawing.canvas import pixels_of
from latentdiff.drawing.hints import Hint, value_of
from latentdiff.drawing.request import Request
from latentdiff.networks.conditions import Conditions, image_prompt

LARGEST_NUMBER = 64  # of pictures of one adapter


@dataclass(frozen=True, eq=False)
class ImagePrompt:
    """The image prompt of one IP-Adapter: pictures, and perhaps masks of where each acts; or features in their place.

    features: (N, ...) with the pictures and (N, ...) without: the caller's, or those of `pictures`, computed once.
    """

    pictures: tuple[Hint, ...] = ()
    masks: tuple[Hint, ...] = ()
    features: list[tuple[Any, Any]] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """The entry in the record of a picture."""
        return {name: [hint.record() for hint in getattr(self, name)] for name in ("pictures", "masks")}

    @property
    def form(self) -> tuple[int, bool]:
        """What pictures of one batch must have in common."""
        return len(self.pictures), bool(self.masks)

    def features_by(self, adapter: Any) -> tuple[Any, Any]:
        """The features of the pictures and those of none, computed once."""
        if not self.features:
            if adapter.encoder is None:
                raise ConfigError("this IP-Adapter was loaded without an image encoder: give ip_adapter_image_embeds")
            self.features.append(adapter.features([hint.pixels for hint in self.pictures]))
        return self.features[0]


def image_prompts_of(
    images: Any, masks: Any, count: int, names: Sequence[Sequence[str | None]] = (), embeds: Any = None
) -> tuple[ImagePrompt, ...]:
    """The image prompts of that many IP-Adapters. images: one picture, or for each adapter a picture or a list.

    masks: None, or for each adapter None or a mask for each picture: white is where it acts. embeds: for each adapter
    features (2, N, ...), those of no picture first, or (1, N, ...), as diffusers has them. Raises ConfigError.
    """
    if embeds is not None:
        return _of_embeds(embeds, images, count)
    listed = list(images) if isinstance(images, list | tuple) else [] if images is None else [images]
    if count == 1 and len(listed) > 1 and not isinstance(listed[0], list | tuple):
        raise ConfigError("several pictures of one IP-Adapter are a list in a list: ip_adapter_image=[[a, b]]")
    if len(listed) != count:
        loaded = f"{count} IP-Adapters are loaded" if count else "no IP-Adapter is loaded"
        raise ConfigError(f"{len(listed)} image prompts, and {loaded} (load_ip_adapter, --ip-adapter)")
    if masks is not None and not (isinstance(masks, list | tuple) or getattr(masks, "ndim", 0) >= 3):
        raise ConfigError("ip_adapter_masks must be a list with the masks of each IP-Adapter")
    masked = [None] * count if masks is None else list(masks)
    if len(masked) != count:
        raise ConfigError(f"{len(masked)} lists of masks, and {count} IP-Adapters")
    image_prompts = []
    for index, (one, own) in enumerate(zip(listed, masked, strict=True)):
        pictures = list(one) if isinstance(one, list | tuple) else [one]
        if not 1 <= len(pictures) <= LARGEST_NUMBER:
            raise ConfigError(f"an IP-Adapter shows 1 to {LARGEST_NUMBER} pictures (got {len(pictures)})")
        named = list(names[index]) if names else [None] * len(pictures)
        hints = tuple(Hint(pixels_of(each), name) for each, name in zip(pictures, named, strict=True))
        over = () if own is None else tuple(Hint(pixels_of(mask)) for mask in _masks_of(own))
        if over and len(over) != len(hints):
            raise ConfigError(f"{len(over)} masks for {len(hints)} pictures of an IP-Adapter")
        image_prompts.append(ImagePrompt(hints, over))
    return tuple(image_prompts)


def _masks_of(masks: Any) -> list[Any]:
    """Masks of one adapter: a list of pictures, or a tensor (1, N, H, W), as diffusers' processor makes."""
    if hasattr(masks, "detach"):
        masks = masks.detach().float().cpu().numpy()
    if isinstance(masks, np.ndarray) and masks.ndim == 4 and len(masks) == 1:
        if not masks.size or not np.isfinite(masks).all():
            raise ConfigError("ip_adapter_masks must hold finite numbers")
        masks = [np.rint(255 * np.clip(mask, 0, 1)).astype(np.uint8) for mask in masks[0]]
    listed = list(masks) if isinstance(masks, list | tuple) else [masks]
    return [Image.fromarray(m) if isinstance(m, np.ndarray) and m.ndim == 2 else m for m in listed]


def _of_embeds(embeds: Any, images: Any, count: int) -> tuple[ImagePrompt, ...]:
    if images is not None:
        raise ConfigError("ip_adapter_image_embeds replace ip_adapter_image: give only one of them")
    listed = list(embeds) if isinstance(embeds, list | tuple) else [embeds]
    if len(listed) != count:
        raise ConfigError(f"{len(listed)} ip_adapter_image_embeds, and {count} IP-Adapters are loaded")
    for each in listed:
        is_tensor = getattr(each, "ndim", 0) in (3, 4) and hasattr(each, "is_floating_point")
        if not is_tensor or len(each) not in (1, 2) or not each.is_floating_point() or not each.numel():
            raise ConfigError("ip_adapter_image_embeds must be tensors (2, N, ...), without and with the pictures")
    return tuple(ImagePrompt(features=[(each[-1], each[0] if len(each) == 2 else 0 * each[-1])]) for each in listed)


def with_image_prompts(
    cond: Conditions,
    uncond: Conditions | None,
    adapters: Sequence[Any],
    image_prompts: Sequence[Sequence[ImagePrompt]],
    request: Request,
    put: Put,
) -> tuple[Conditions, Conditions | None]:
    """The conditions of a batch with its image prompts; the negative ones show no picture.

    image_prompts: by each picture of the batch. put: an array where the networks are. Raises ConfigError.
    """
    arrays: tuple[dict[str, Array], dict[str, Array]] = ({}, {})
    for index, (adapter, *own) in enumerate(zip(adapters, *image_prompts, strict=True)):
        scales = layer_scales(adapter.names, value_of(request.ip_adapter_scale, index, 1.0))
        masks = _masks(own, put)
        for one, features in zip(arrays, zip(*(each.features_by(adapter) for each in own), strict=True), strict=True):
            stacked = library(features[0]).stack(list(features))
            with raised_as(ConfigError, "the features do not fit the IP-Adapter"):
                _show(one, partial(_heads, adapter, scales, put), stacked, masks)
    return cond.joined(arrays[0]), None if uncond is None else uncond.joined(arrays[1])


def _heads(adapter: Any, scales: list[float], put: Put, features: Array) -> list[Array]:
    """The keys and values of pictures for each layer, where the backbone is."""
    return [put(heads) for heads in adapter.heads(features, scales)]


def _show(arrays: dict[str, Array], heads: Callable[[Array], list[Array]], features: Array, masks: Any) -> None:
    """Add the keys and values of the pictures; with masks, those of each picture by itself."""
    if masks is None:
        arrays.update(image_prompt(_next(arrays), heads(features)))
    for number, mask in enumerate(masks or ()):
        arrays.update(image_prompt(_next(arrays), heads(features[:, number : number + 1]), mask))


def _next(arrays: Mapping[str, Array]) -> int:
    """The number of the image prompts so far."""
    return len({name.split("_")[1] for name in arrays})


def _masks(own: Sequence[ImagePrompt], put: Put) -> list[Array] | None:
    """For each picture of an adapter its masks in the batch, (B, H, W) in [0, 1]; None without masks."""
    if not own[0].masks:
        return None
    columns = zip(*(each.masks for each in own), strict=True)
    sides = {hint.pixels.shape for each in own for hint in each.masks}
    if len(sides) > 1:
        raise ConfigError("the masks of an IP-Adapter must have one size")
    hard = [np.stack([hint.pixels[..., 0] >= 128 for hint in column]).astype(np.float32) for column in columns]
    return [put(mask) for mask in hard]


def layer_scales(names: Sequence[str], scale: float | Mapping[str, Any]) -> list[float]:
    """The scale of each cross-attention. scale: for all, or by block as in diffusers; blocks not named have 0.

    {"up": {"block_0": [0.0, 1.0, 0.0]}} is style alone in Stable Diffusion XL (Wang et al. 2024). Raises ConfigError.
    """
    if not isinstance(scale, Mapping):
        return [float(scale)] * len(names)
    places = [_place(name) for name in names]
    chosen: dict[int, float] = {}
    for part, blocks in scale.items():
        own = {i: place for i, place in enumerate(places) if place[0] == part}
        _fill(chosen, own, blocks, part)
    return [chosen.get(index, 0.0) for index in range(len(names))]


def _place(name: str) -> tuple[str, str, int]:
    """down_blocks.1.attentions.0... -> ("down", "block_1", 0); of the middle ("mid", "", 0)."""
    part, rest = name.split(".", 1)
    if part == "mid_block":
        return "mid", "", int(rest.split(".")[1])
    number, _, attention, *_ = rest.split(".")
    return part.removesuffix("_blocks"), f"block_{number}", int(attention)


def _fill(chosen: dict[int, float], own: Mapping[int, tuple[str, str, int]], wanted: Any, where: str) -> None:
    """Set the scales of the layers `own` as wanted: one number, one for each, or by block."""
    if not own:
        raise ConfigError(f"ip_adapter_scale: there is no {where}")
    if isinstance(wanted, Mapping):
        for block, scale in wanted.items():
            _fill(chosen, {i: place for i, place in own.items() if place[1] == block}, scale, f"{where}: {block}")
        return
    if isinstance(wanted, list | tuple):
        count = len({place[2] for place in own.values()})
        if len(wanted) != count or len({place[1] for place in own.values()}) > 1:
            raise ConfigError(f"ip_adapter_scale: {where} has {count} attentions (got {len(wanted)} scales)")
        chosen.update({index: float(wanted[place[2]]) for index, place in own.items()})
        return
    if isinstance(wanted, bool) or not isinstance(wanted, int | float):
        raise ConfigError(f"ip_adapter_scale: {where} must be a number (got {str(wanted)[:40]!r})")
    chosen.update(dict.fromkeys(own, float(wanted)))
