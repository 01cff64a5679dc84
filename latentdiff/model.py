"""A model: what loaders return and everything else takes. A frozen value; what changes it returns another.

Transform = Model -> Model      speed, offload, another precision or device, a merged adapter
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, Literal, Protocol

from latentdiff.core.arrays import Array, to_numpy
from latentdiff.diffusion.path import Path
from latentdiff.networks.protocols import Backbone, Codec, Encoder

if TYPE_CHECKING:
    import torch

Size = tuple[int, int]  # (height, width) in pixels
Speed = Literal["exact", "fast", "max"]
Runtime = Literal["torch", "openvino"]
Transform = Callable[["Model"], "Model"]
Ready = Callable[[tuple[int, ...], int, bool], None]


@dataclass(frozen=True)
class ModelCard:
    """What a model says beside its weights: name, hash, size in pixels, recommended settings, where it came from."""

    name: str = "model"
    hash: str = ""
    size: Size = (64, 64)
    defaults: dict[str, Any] = field(default_factory=dict)
    source: str | None = None  # a path or hub id as the user named it; None is the default model
    variant: str | None = None  # of its weights
    folder: FilePath | None = field(default=None, compare=False)  # where the model lies, unless it is a single file


class Place(Protocol):
    """Where networks compute and with which arrays."""

    @property
    def runtime(self) -> Runtime:
        """Which library computes."""
        ...

    @property
    def device(self) -> Any:
        """A torch.device, or "cpu"."""
        ...

    def array(self, values: Array) -> Array:
        """NumPy values, or a tensor, as the networks take them."""
        ...


@dataclass(frozen=True)
class TorchPlace:
    """Tensors on one device of torch's."""

    device: Any = "cpu"
    runtime: Runtime = "torch"

    def array(self, values: Array) -> Array:
        """See Place."""
        import torch

        return torch.as_tensor(values).to(self.device)


@dataclass(frozen=True)
class NumPyPlace:
    """NumPy arrays on the CPU."""

    device: str = "cpu"
    runtime: Runtime = "openvino"

    def array(self, values: Array) -> Array:
        """See Place."""
        return to_numpy(values)


@dataclass(frozen=True)
class Family:
    """A kind of models: which parts go together, and how a model is read and written.

    parts: for each part of a folder the classes that it may have, the safety list; optional: parts that may be absent.
    pipelines: diffusers' pipeline classes. load: a checked folder and the variant of its weights -> the model on the
    CPU in the precision in which it is stored. save: a model's networks into a new folder. index: its model_index.json.
    """

    name: str
    pipelines: frozenset[str]
    parts: Mapping[str, frozenset[str]]
    optional: frozenset[str]
    load: Callable[[FilePath, str | None], Model]
    save: Callable[[Model, FilePath], None]
    index: Callable[[Model], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Model:
    """Networks, the path between data and noise, and what the backbone predicts.

    parts: diffusers' names -> the libraries' own objects, for saving, adapters and hashing. other: the same model by
    torch, where this one is compiled and may be replaced. ready: lets compiled networks get ready for latents
    (B, C, h, w) under so many conditions, with or without deep features to be used again.
    """

    backbone: Backbone
    encoder: Encoder
    codec: Codec
    path: Path
    prediction: str
    card: ModelCard
    place: Place
    family: Family | None = None
    parts: Mapping[str, Any] = field(default_factory=dict)
    speed: Speed = "exact"
    other: Callable[[], Model] | None = None
    ready: Ready | None = None

    @property
    def runtime(self) -> Runtime:
        """What the networks compute with."""
        return self.place.runtime

    @property
    def dtype(self) -> str:
        """The precision of the backbone, by torch's name without the prefix."""
        return str(self.backbone.dtype).removeprefix("torch.")

    @property
    def multiple(self) -> int:
        """What the sides of pictures must be multiples of, in pixels."""
        return self.codec.factor * self.backbone.spec.multiple

    @property
    def inpaints(self) -> bool:
        """Whether the backbone reads a mask and what it hides beside x."""
        return self.backbone.spec.inputs != self.codec.latent_channels

    @property
    def reads_sizes(self) -> bool:
        """Whether the backbone is told sizes in pixels, as Stable Diffusion XL's."""
        return "sizes" in self.backbone.spec.reads

    def array(self, values: Array) -> Array:
        """See Place."""
        return self.place.array(values)

    def modules(self) -> list[torch.nn.Module]:
        """The networks as torch modules: backbone, encoder, codec. Raises TypeError for a compiled model."""
        if self.runtime != "torch":
            raise TypeError("a compiled model has no torch modules")
        return [self.backbone, self.encoder, self.codec]  # type: ignore[list-item]
