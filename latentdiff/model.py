"""The model, a frozen value: loaders return it, and all functions that change a model return another.

Transform = Model -> Model      speed, offload, quantized weights, another precision or device
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from types import MappingProxyType
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
EMPTY: Mapping[str, Any] = MappingProxyType({})
Ready = Callable[[tuple[int, ...], int, bool], None]


@dataclass(frozen=True)
class ModelCard:
    """The facts about a model beside its weights: name, hash, size in pixels, recommended settings, source."""

    name: str = "model"
    hash: str = ""
    size: Size = (64, 64)
    defaults: dict[str, Any] = field(default_factory=dict)
    source: str | None = None  # the user's path or hub id; None is the default model
    variant: str | None = None  # the variant of its weights
    folder: FilePath | None = field(default=None, compare=False)  # the model's folder, unless it is a single file
    words: frozenset[str] | None = None  # of all captions that it was trained on, if they are known
    of_one_thing: dict[str, str] = field(default_factory=dict)  # words of captions of one thing alone -> its name
    things: Mapping[str, tuple[str, ...]] | None = None  # the names of what it draws, by category
    notes: tuple[str, ...] = ()  # settings of its scheduler's config that are not followed


class Place(Protocol):
    """The place of a model's networks: the library, the device, the kind of arrays."""

    @property
    def runtime(self) -> Runtime:
        """The library that computes."""
        ...

    @property
    def device(self) -> Any:
        """A torch.device, or "cpu"."""
        ...

    def array(self, values: Array) -> Array:
        """NumPy values or a tensor, converted for the networks."""
        ...


@dataclass(frozen=True)
class TorchPlace:
    """torch's tensors on one device."""

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
class Enlarging:
    """How a model enlarges a small picture, which its backbone reads beside x.

    scale: the side of its picture divided by the small one's. path: of the noise that is added to the small picture
    first (noise augmentation, Ho et al. 2022, Cascaded Diffusion Models, section 4); the backbone reads the time,
    which is below `times`. usual: the default time.
    """

    scale: int
    path: Path
    times: int
    usual: int = 20


@dataclass(frozen=True)
class Layout:
    """The layout of a family's single files.

    config: names and shapes of a transformer -> its config in diffusers, or None if it belongs to another family.
    converted: weights -> the same under diffusers' names. load: as in Family, with parts that are given as weights.
    """

    config: Callable[[Mapping[str, tuple[int, ...]]], dict[str, Any] | None]
    converted: Callable[[dict[str, Any]], dict[str, Any]]
    load: Callable[[FilePath, str | None, Mapping[str, Any]], Model]


@dataclass(frozen=True)
class Family:
    """A family of models: their parts, and how they are read and written.

    parts: the classes that each part of a folder may have, which is the safety list; optional: parts that may be
    missing. pipelines: diffusers' pipeline classes. load: a checked folder and the variant of its weights -> the model
    on the CPU in its stored precision. save: write a model's networks into a new folder. index: its model_index.json.
    defaults: settings that its pipeline in diffusers has, where a folder recommends none. layout: of its single files.
    architecture: see `called`, where it is not the family's name. path: the scheduler's path -> the one that
    is used. context: for editing models that cannot draw without a picture, its latents -> what the backbone reads.
    enlarging: how the models of a folder enlarge, if they do.
    """

    name: str
    pipelines: frozenset[str]
    parts: Mapping[str, frozenset[str]]
    optional: frozenset[str]
    load: Callable[[FilePath, str | None], Model]
    save: Callable[[Model, FilePath], None]
    index: Callable[[Model], dict[str, Any]]
    defaults: Callable[[FilePath], Mapping[str, Any]] = lambda directory: EMPTY
    layout: Layout | None = None
    architecture: Callable[[Model], str] | None = None
    path: Callable[[Path], Path] = lambda path: path
    context: Callable[[Model, Array], Array] | None = None
    enlarging: Callable[[FilePath], Enlarging | None] = lambda directory: None

    def called(self, model: Model) -> str:
        """The name of a model's architecture in the metadata of adapters, as modelspec lists them."""
        return self.name.lower().replace(" ", "-") if self.architecture is None else self.architecture(model)


@dataclass(frozen=True, eq=False)
class Model:
    """Networks, the path between data and noise, and the backbone's prediction.

    parts: diffusers' names -> the libraries' own objects, for saving, adapters and hashing. torch_form: loads the same
    model in torch, if this one is compiled; runtime_is_fixed: whether torch must not take over. ready: starts
    compilation for latents (B, C, h, w), a number of conditions, and with or without reused deep features.
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
    torch_form: Callable[[], Model] | None = None
    runtime_is_fixed: bool = False
    ready: Ready | None = None
    enlarging: Enlarging | None = None
    quantized: str | None = None  # the kind of its weights, if they have fewer bits; see runtime/quantized.py

    @property
    def runtime(self) -> Runtime:
        """The library that the networks compute with."""
        return self.place.runtime

    @property
    def dtype(self) -> str:
        """The precision of the backbone, by torch's name without the prefix."""
        return str(self.backbone.dtype).removeprefix("torch.")

    @property
    def multiple(self) -> int:
        """The number of pixels that the sides of pictures must be multiples of."""
        return self.codec.factor * self.backbone.spec.multiple

    @property
    def inpaints(self) -> bool:
        """Whether the backbone reads a mask and the masked picture beside x."""
        return self.backbone.spec.inputs == 2 * self.codec.latent_channels + 1

    @property
    def edits(self) -> bool:
        """Whether the backbone reads an input picture beside x, which it draws anew as the prompt says."""
        return self.enlarging is None and self.backbone.spec.inputs == 2 * self.codec.latent_channels

    @property
    def must_edit(self) -> bool:
        """Whether it edits a picture and cannot draw without one."""
        return self.edits and self.family is not None and self.family.context is not None

    @property
    def reads_sizes(self) -> bool:
        """Whether the backbone reads sizes in pixels, like Stable Diffusion XL's."""
        return "sizes" in self.backbone.spec.reads

    @property
    def reads_guidance(self) -> bool:
        """Whether the backbone reads guidance_scale as a condition instead of being guided by it."""
        return "guidance" in self.backbone.spec.reads

    def array(self, values: Array) -> Array:
        """See Place."""
        return self.place.array(values)

    def modules(self) -> list[torch.nn.Module]:
        """The networks as torch modules: backbone, encoder, codec. Raises TypeError for a compiled model."""
        if self.runtime != "torch":
            raise TypeError("a compiled model has no torch modules")
        return [self.backbone, self.encoder, self.codec]  # type: ignore[list-item]
