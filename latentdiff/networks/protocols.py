"""The protocols of networks, whatever their library and runtime: drawing and training use nothing else.

A new family of models needs a backbone, and perhaps an encoder or a codec, that satisfies these. An ability that only
some networks have is a protocol of its own, which callers test by `isinstance`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from latentdiff.core.arrays import Array
from latentdiff.networks.conditions import Conditions
from latentdiff.networks.encoders.prompt import Prompt, Reading, Style


@dataclass(frozen=True)
class Spec:
    """The shapes that a backbone works on.

    inputs: the number of channels that it reads: the data's, and for inpainting those of a mask and the masked data.
    outputs: the number of channels that it returns. multiple: sides must be multiples of this. reads: the conditions
    that it requires, each with its shape for one picture, in which None stands for any length. largest: the longest
    side of x, if there is a limit. square: whether both sides must be equal. side: the only side of x that a graph
    accepts, if its positions are fixed.
    """

    inputs: int
    outputs: int
    multiple: int = 1
    reads: Mapping[str, tuple[int | None, ...]] = field(default_factory=dict)
    largest: int | None = None
    square: bool = False
    side: int | None = None

    def facts(self) -> dict[str, Any]:
        """The fields as JSON values."""
        shapes = {name: list(shape) for name, shape in self.reads.items()}
        return asdict(replace(self, reads=shapes))  # type: ignore[arg-type]


@runtime_checkable
class Backbone(Protocol):
    """The network that is sampled: a U-Net, a transformer, a prior over vectors, a network of points."""

    dtype: Any

    @property
    def spec(self) -> Spec:
        """Its shapes."""
        ...

    def predict(self, x: Array, time: Array, conditions: Conditions) -> Array:
        """x (B, C, ...), time one number or (B,) -> float32 (B, C', ...), no gradients; K conditions: (K, B, ...)."""
        ...


Control = Callable[[Backbone], Backbone]


@runtime_checkable
class PreparesConditions(Protocol):
    """A backbone that computes a part of its conditions once a picture instead of at every step."""

    def prepared(self, conditions: Conditions) -> Conditions:
        """The conditions that `predict` takes at every step."""
        ...


@runtime_checkable
class DeepFeatures(Protocol):
    """A backbone whose deep features can be reused at the next step (DeepCache, Ma et al. 2024)."""

    @property
    def deep_levels(self) -> int:
        """The number of levels below the finest."""
        ...

    def predict_from(self, x: Array, time: Array, conditions: Conditions, deep: Array | None) -> tuple[Array, Array]:
        """`predict` and the deep features. With those of an earlier step only the finest level is computed."""
        ...


@runtime_checkable
class PromptedByPictures(Protocol):
    """A backbone whose cross-attention attends to image prompts too (IP-Adapter, Ye et al. 2023)."""

    @property
    def prompted_layers(self) -> Sequence[tuple[str, int]]:
        """The name of each cross-attention, and the width of its keys and values; empty if none can be added."""
        ...


@runtime_checkable
class PacksLatents(Backbone, Protocol):
    """A backbone whose latents diffusers' pipelines take and return as tokens."""

    def packed(self, x: Array) -> Array:
        """(B, C, h, w) -> (B, L, D)."""
        ...

    def unpacked(self, tokens: Array, height: int, width: int) -> Array:
        """(B, L, D) -> (B, C, h, w)."""
        ...


@runtime_checkable
class PerturbedAttention(Protocol):
    """A backbone with a weakened form, for guidance away from its prediction (Ahn et al. 2024)."""

    @property
    def perturbed_blocks(self) -> int:
        """The number of self-attentions to perturb."""
        ...

    def predict_perturbed(self, x: Array, time: Array, conditions: Conditions) -> Array:
        """`predict` with the identity for the self-attention maps of the middle block."""
        ...


@runtime_checkable
class Encoder(Protocol):
    """Prompts to conditions: a text encoder, a table of class labels."""

    @property
    def length(self) -> int:
        """The number of tokens of a chunk, with start and end."""
        ...

    def read(self, prompt: str, style: Style) -> Reading:
        """How a prompt is read; nothing is encoded. Raises ConfigError for a prompt that cannot be read."""
        ...

    def encode(self, prompt: Prompt) -> Conditions:
        """The conditions of one picture. Those of the empty prompt stand for no prompt, as in training."""
        ...


@runtime_checkable
class Codec(Protocol):
    """Data <-> latents. Only the codec knows the scale and shift of latents: outside they have unit variance."""

    dtype: Any
    factor: int
    latent_channels: int
    image_channels: int

    def shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """(C, h, w) of the latents of a picture of (height, width)."""
        ...

    def latents_of(self, images: Array) -> Array:
        """Images (B, C, H, W) in [-1, 1] -> latents (B, ...), float32, without gradients."""
        ...

    def images_of(self, latents: Array) -> Array:
        """Latents -> images about in [-1, 1], float32, without gradients."""
        ...

    def in_float32(self) -> AbstractContextManager[None]:
        """A block in which the codec computes in float32, for values too large for its precision."""
        ...

    def piecewise(self, *, tiles: bool, slices: bool) -> AbstractContextManager[None]:
        """A block that takes less memory: overlapping tiles, or one picture of a batch at a time."""
        ...


@runtime_checkable
class ShowsLatents(Protocol):
    """A codec whose latents diffusers' pipelines return in another layout and scale."""

    def to_diffusers(self, latents: Array) -> Array:
        """Latents (B, C, h, w) as they are returned."""
        ...


@runtime_checkable
class Posterior(Protocol):
    """A codec that gives a distribution of an image's latents, so that pixels have a likelihood."""

    def posterior(self, images: Any) -> tuple[Any, Any]:
        """Mean and log-variance of q(x0 | image)."""
        ...
