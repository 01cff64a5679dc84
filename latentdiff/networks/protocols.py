"""What drawing and training ask of networks, whichever library and runtime they come from.

Adding a family of models is one backbone, and where new one encoder or codec, that satisfies these. What not every
network can do is a protocol of its own, found by `isinstance`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from latentdiff.core.arrays import Array
from latentdiff.networks.conditions import Conditions
from latentdiff.networks.encoders.prompt import Reading, Style, Wanted


@dataclass(frozen=True)
class Spec:
    """The shapes that a backbone works on.

    inputs: channels that it reads: those of its data, and for inpainting a mask's and the masked data's. outputs:
    channels that it gives. multiple: what sides must be multiples of. reads: for each array of conditions that it needs
    its shape of one picture, None where any length does.
    """

    inputs: int
    outputs: int
    multiple: int = 1
    reads: Mapping[str, tuple[int | None, ...]] = field(default_factory=dict)


@runtime_checkable
class Backbone(Protocol):
    """The network that is sampled: U-Net, transformer, a prior over vectors, a network of points."""

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
    """A backbone that computes something of its conditions once a picture instead of at every step."""

    def prepared(self, conditions: Conditions) -> Conditions:
        """The conditions as `predict` takes them at every step."""
        ...


@runtime_checkable
class DeepFeatures(Protocol):
    """A backbone whose deep features can be kept for the next step (DeepCache, Ma et al. 2024)."""

    @property
    def deep_levels(self) -> int:
        """How many levels there are below the finest."""
        ...

    def predict_from(self, x: Array, time: Array, conditions: Conditions, deep: Array | None) -> tuple[Array, Array]:
        """`predict`, and the deep features; given those of an earlier step, only the finest level is computed."""
        ...


@runtime_checkable
class PerturbedAttention(Protocol):
    """A backbone that can be made worse on purpose, for guidance away from that (Ahn et al. 2024)."""

    @property
    def perturbed_blocks(self) -> int:
        """How many self-attentions there are to perturb."""
        ...

    def predict_perturbed(self, x: Array, time: Array, conditions: Conditions) -> Array:
        """`predict` with the identity for the self-attention maps of the middle block."""
        ...


@runtime_checkable
class Encoder(Protocol):
    """Prompts to conditions: a text encoder, a table of class labels."""

    @property
    def length(self) -> int:
        """The number of tokens that are read at once, with start and end."""
        ...

    def read(self, prompt: str, style: Style) -> Reading:
        """How a prompt would be read, without encoding it. Raises ConfigError for a prompt that cannot be read."""
        ...

    def encode(self, wanted: Wanted) -> Conditions:
        """The conditions of one picture; those of the empty prompt are what the model was trained on without one."""
        ...


@runtime_checkable
class TrainedEncoder(Protocol):
    """An encoder that can be a part of the module that is trained."""

    def tokenize(self, prompts: list[str]) -> Any:
        """Token ids (B, ...) on the CPU, as training reads prompts: without weights, cut where the encoder ends."""
        ...

    def __call__(self, ids: Any) -> Conditions:
        """Conditions of token ids, with gradients."""
        ...


@runtime_checkable
class Codec(Protocol):
    """Data <-> latents. The scale and shift of latents are known here alone: on this side they have unit variance."""

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
        """A block in which it computes in float32, for values that a narrower precision cannot hold."""
        ...

    def piecewise(self, *, tiles: bool, slices: bool) -> AbstractContextManager[None]:
        """A block in which it takes less memory: in overlapping tiles, or one picture of a batch at a time."""
        ...


@runtime_checkable
class Posterior(Protocol):
    """A codec for which the latents of an image are a distribution, so that pixels have a likelihood."""

    def posterior(self, images: Any) -> tuple[Any, Any]:
        """Mean and log-variance of q(x0 | image)."""
        ...
