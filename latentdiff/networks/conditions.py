"""Conditions: what a backbone reads beside the noisy data and the time, as named arrays.

Only encoders and backbones know the names. Those in use:

    tokens   (B, L, D)   a text, for cross-attention
    mask     (B, L)      1 where `tokens` holds the text and 0 after its end, for prompts of different lengths
    pooled   (B, P)      one vector a text
    sizes    (B, 6)      pixels, as Stable Diffusion XL reads them: original (height, width), the crop's (top, left),
                         the target (height, width); always float32, in which 1023 is itself
    guidance (B,)        the guidance that a distilled backbone reads
    until    (B,)        the time to which a mean flow's velocity is averaged
    label    (B,)        a class, whole numbers
    ids      (B, L)      token ids for an encoder in the same module; (B, 2, L) for two encoders
    beside   (B, C, h, w) what a backbone reads in further channels of x, in training
    hint     (B, C, H, W) the picture that a control reads in training, in [0, 1]
    residual_00, ...     (B, C, h, w), what a control adds to each skip connection; the last to the middle
    feature_00, ...      (B, C, h, w), what a control adds within each level
    features             (B, N, ...), of N pictures, from which an image prompt is made in training
    image_00_00, ...     (B, 2, L, C), each image prompt's keys and values for each cross-attention
    image_00_mask        (B, H, W) in [0, 1], where an image prompt acts; without one everywhere
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from latentdiff.core.arrays import Array, library

if TYPE_CHECKING:
    import torch

# keep their precision when a network computes in another
EXACT = ("sizes", "guidance", "until", "label", "ids", "mask")
RESIDUAL, FEATURE, IMAGE = "residual_", "feature_", "image_"
HINT, FEATURES, BESIDE = "hint", "features", "beside"
_MASK = "mask"


def added(arrays: Sequence[Array], kind: str = RESIDUAL) -> dict[str, Array]:
    """What a control adds, RESIDUAL or FEATURE, by name."""
    return {f"{kind}{index:02}": array for index, array in enumerate(arrays)}


def image_prompt(number: int, heads: Sequence[Array], mask: Array | None = None) -> dict[str, Array]:
    """The keys and values of an image prompt, and its mask, by name."""
    arrays = {f"{IMAGE}{number:02}_{layer:02}": array for layer, array in enumerate(heads)}
    return arrays if mask is None else arrays | {f"{IMAGE}{number:02}_{_MASK}": mask}


class ImagePrompt(NamedTuple):
    """The keys and values (B, 2, L, C) of an image prompt for each cross-attention, and where it acts (B, H, W)."""

    heads: list[Array]
    mask: Array | None


@dataclass(frozen=True)
class Conditions:
    """Named arrays of NumPy or torch, batch first; those of one picture have no batch axis.

    count: K conditions of every picture at once; the arrays then have K in front. prepared: what a backbone has
    computed from them once a picture (see protocols.PreparesConditions).
    """

    arrays: Mapping[str, Array]
    count: int = 0
    prepared: Any = None

    def __getitem__(self, name: str) -> Array:
        return self.arrays[name]

    def added(self, kind: str) -> list[Array]:
        """What controls add, RESIDUAL or FEATURE, in order; empty without controls."""
        return [array for name, array in sorted(self.arrays.items()) if name.startswith(kind)]

    @property
    def image_prompts(self) -> list[ImagePrompt]:
        """The image prompts, in order."""
        prompts: dict[str, dict[str, Array]] = {}
        for name, array in sorted(self.arrays.items()):
            if name.startswith(IMAGE):
                number, _, rest = name.removeprefix(IMAGE).partition("_")
                prompts.setdefault(number, {})[rest] = array
        return [ImagePrompt([a for n, a in own.items() if n != _MASK], own.get(_MASK)) for own in prompts.values()]

    def get(self, name: str) -> Array | None:
        """The array of that name, or None."""
        return self.arrays.get(name)

    def mapped(self, change: Callable[[Array], Array], names: Iterable[str] | None = None) -> Conditions:
        """The same conditions with every array, or only those of some names, changed by a function."""
        chosen = self.arrays.keys() if names is None else set(names)
        arrays = {name: change(array) if name in chosen else array for name, array in self.arrays.items()}
        return replace(self, arrays=arrays)

    def to(self, device: torch.device) -> Conditions:
        """The same tensors on another device."""
        return self.mapped(lambda tensor: tensor.to(device))

    def cast(self, dtype: torch.dtype) -> Conditions:
        """The same conditions in another precision, except for the arrays named in EXACT."""
        return self.mapped(lambda tensor: tensor.to(dtype), self.arrays.keys() - EXACT)

    def flattened(self) -> Conditions:
        """K conditions of B pictures as one condition of K B pictures."""
        return replace(self.mapped(lambda array: array.reshape(-1, *array.shape[2:])), count=0)

    def joined(self, more: Mapping[str, Array]) -> Conditions:
        """The same conditions with more arrays."""
        return replace(self, arrays={**self.arrays, **more})


def stacked(each: Sequence[Conditions]) -> Conditions:
    """Conditions of single pictures as those of a batch: one more axis in front."""
    return Conditions({name: _stack([one[name] for one in each]) for name in each[0].arrays})


def together(each: Sequence[Conditions]) -> Conditions:
    """Several conditions of the same batch, (K, B, ...)."""
    return replace(stacked(each), count=len(each))


def _stack(arrays: list[Array]) -> Array:
    return library(arrays[0]).stack(arrays)
