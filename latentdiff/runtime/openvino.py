"""The networks of a model by OpenVINO on a CPU: NumPy arrays in and out, without torch.

They satisfy the protocols of `networks.protocols`, so that the same samplers and guidance run with both. In bfloat16
products have 8 bits of mantissa and are summed in float32; inputs and outputs are always float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from latentdiff.core.errors import ConfigError, ModelError, loading
from latentdiff.core.turn import Turn
from latentdiff.formats.folder import network_hash
from latentdiff.networks.backbones.packing import Packing
from latentdiff.networks.conditions import IMAGE, RESIDUAL, Conditions
from latentdiff.networks.protocols import Spec
from latentdiff.runtime.compiling import Compiler
from latentdiff.runtime.graphs import FOLDER, Exported, exported
from latentdiff.runtime.texts import compiled_texts


class CompiledBackbone:
    """(x_t, t, conditions) -> output; see networks.backbones."""

    def __init__(self, compiler: Compiler, record: dict[str, Any]):
        self.compiler, self.dtype, self.record = compiler, compiler.precision, record
        reads = {name: tuple(shape) for name, shape in record["reads"].items()}
        inputs, outputs, multiple = (int(record[name]) for name in ("inputs", "outputs", "multiple"))
        self.spec = Spec(
            inputs, outputs, multiple, reads, record.get("largest"), bool(record.get("square")), record.get("side")
        )
        self.deep_levels = int(record["deep_levels"])
        self.prompted_layers = [(str(name), int(width)) for name, width in record.get("attentions", ())]

    def begin(self, rows: int, size: tuple[int, ...], tokens: int, *, deep: bool) -> None:
        """Begin to compile for latents of (h, w), unless some shapes are unknown before a prompt has been read."""
        if list(self.spec.reads) == ["tokens"] and not self.record["token_step"]:
            shapes = {"x": (rows, self.spec.inputs, *size), "time": (1,)}
            shapes["tokens"] = (rows, tokens, int(self.spec.reads["tokens"][1] or 0))
            self.compiler.begin(self._graph(self.spec.inputs) + "_deep" * deep, tuple(shapes.items()))

    def _graph(self, channels: int) -> str:
        """The graph for x of that many channels."""
        return str(self.record["graphs"][str(channels)])

    def predict(self, x: np.ndarray, t: float, conditions: Conditions) -> np.ndarray:
        """See Backbone."""
        return self._run(self._graph(x.shape[1]), x, t, conditions)[0]

    def predict_from(
        self, x: np.ndarray, t: float, conditions: Conditions, deep: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """See DeepFeatures."""
        graph = self._graph(x.shape[1])
        if deep is not None:
            return self._run(f"{graph}_shallow", x, t, conditions, deep=deep)[0], deep
        output, deep = self._run(f"{graph}_deep", x, t, conditions)
        return output, deep

    def _run(self, graph: str, x: np.ndarray, t: float, conditions: Conditions, **more: np.ndarray) -> list[np.ndarray]:
        """The outputs of a graph, the first like x, or (K, B, C, h, w) under K conditions."""
        copies, count = conditions.count or 1, conditions.count
        flat = conditions.flattened() if count else conditions
        factor, shift = self.record["clock"]
        inputs = {"x": np.concatenate([x] * copies), "time": np.array([factor * float(t) + shift], np.float32)}
        inputs |= {name: flat[name] for name in self.spec.reads}
        if step := int(self.record["token_step"]):
            inputs |= _shortened(inputs["tokens"], flat.get("mask"), step)
        if len(conditions.image_prompts) > 1 or any(each.mask is not None for each in conditions.image_prompts):
            raise ConfigError("several image prompts, or masks of one, require the torch runtime")
        for kind, suffix in ((IMAGE, "_prompted"), (RESIDUAL, "_controlled")):
            if steering := {name: array for name, array in flat.arrays.items() if name.startswith(kind)}:
                graph, inputs = f"{graph}{suffix}", inputs | steering
        inputs |= more
        arrays = {name: np.asarray(array, np.float32) for name, array in inputs.items()}
        output, *rest = self.compiler.run(graph, arrays)
        return [output.reshape(count, len(x), *output.shape[1:]) if count else output, *rest]


def _shortened(tokens: np.ndarray, mask: np.ndarray | None, step: int) -> dict[str, np.ndarray]:
    """Tokens (B, L, D) and marks of the prompts, cut after the longest one, padded to a multiple of `step`."""
    marks = np.ones(tokens.shape[:2], np.float32) if mask is None else mask
    longest = int(marks.sum(1).max())
    length = -(-longest // step) * step
    more = max(0, length - tokens.shape[1])
    return {
        "tokens": np.pad(tokens[:, :length], ((0, 0), (0, more), (0, 0))),
        "mask": np.pad(marks[:, :length], ((0, 0), (0, more))),
    }


class PackingBackbone(Packing, CompiledBackbone):
    """A backbone whose latents diffusers' pipelines take and return as tokens."""


class CompiledControl:
    """A ControlNet; see networks.controls.controlnet."""

    adds, once, kinds = RESIDUAL, False, 0

    def __init__(self, compiler: Compiler, record: dict[str, Any], other: Callable[[Any], Any]):
        self._compiler, self.record, self._other = compiler, record, other
        self.guesses, self.factor = bool(record["guesses"]), int(record["factor"])

    def by_torch(self, model: Any) -> Any:
        """The same ControlNet by torch, for a torch model."""
        return self._other(model).to(model.place.device, model.backbone.dtype)

    def residuals(
        self, x: np.ndarray, t: float, conditions: Conditions, hint: np.ndarray, *, scale: float, guess: bool, kind: int
    ) -> list[np.ndarray]:
        """See GivesResiduals."""
        inputs = {"x": x[:, : self.record["inputs"]], "time": np.array([t]), "hint": hint}
        inputs |= {name: conditions[name] for name in self.record["reads"]}
        arrays = {name: np.asarray(array, np.float32) for name, array in inputs.items()}
        own = self._compiler.run("controlnet", arrays)
        if self.guesses:  # one number for each channel
            own = [each.mean((2, 3), keepdims=True) for each in own]
        scales = np.logspace(-1, 0, len(own)) if guess and not self.guesses else np.ones(len(own))
        return [each * np.float32(scale * share) for each, share in zip(own, scales, strict=True)]


class CompiledAutoencoder:
    """images (B, C, H, W) in [-1, 1] <-> latents; see networks.codecs.autoencoder.Autoencoder."""

    def __init__(self, compiler: Compiler, record: dict[str, Any]):
        self._compiler, self.dtype = compiler, compiler.precision
        self.factor, self.latent_channels = int(record["factor"]), int(record["latent_channels"])
        self.image_channels, self._slices, self._turn = int(record["image_channels"]), False, Turn()
        self.scale = float(record.get("scale", 1.0))

    def shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """See Codec."""
        return self.latent_channels, size[0] // self.factor, size[1] // self.factor

    def begin(self, latents: tuple[int, ...]) -> None:
        """Begin to compile the decoder for latents of that shape, (B, C, h, w)."""
        self._compiler.begin("vae_decoder", (("latents", latents),))

    @contextmanager
    def piecewise(self, *, tiles: bool, slices: bool) -> Iterator[None]:
        """See Codec. Tiles and slices require torch."""
        assert not tiles
        with self._turn:
            before, self._slices = self._slices, slices
            try:
                yield
            finally:
                self._slices = before

    def in_float32(self) -> AbstractContextManager[None]:
        """A block that changes nothing: bfloat16 has float32's range."""
        return nullcontext()

    def latents_of(self, images: np.ndarray) -> np.ndarray:
        """The posterior's mean."""
        return self._run("vae_encoder", "images", images)

    def images_of(self, latents: np.ndarray) -> np.ndarray:
        """Images about in [-1, 1]."""
        return self._run("vae_decoder", "latents", latents)

    def _run(self, graph: str, name: str, batch: np.ndarray) -> np.ndarray:
        with self._turn:
            pieces = [row[None] for row in batch] if self._slices else [batch]
        return np.concatenate([self._compiler.run(graph, {name: np.asarray(piece, np.float32)})[0] for piece in pieces])


class ShowingAutoencoder(CompiledAutoencoder):
    """A codec whose latents diffusers' pipelines return in another layout and scale."""

    def to_diffusers(self, latents: np.ndarray) -> np.ndarray:
        """See ShowsLatents."""
        return self._run("vae_shown", "latents", latents)


class PixelCodec:
    """No compression: the latents are the pixels; see networks.codecs.identity.IdentityCodec."""

    factor, dtype = 1, "float32"

    def __init__(self, channels: int):
        self.latent_channels = self.image_channels = channels

    def begin(self, latents: tuple[int, ...]) -> None:
        """Do nothing: there is nothing to compile."""

    def shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """(C, H, W)."""
        return self.latent_channels, *size

    def piecewise(self, *, tiles: bool, slices: bool) -> AbstractContextManager[None]:
        """A block that changes nothing, since nothing is computed."""
        return nullcontext()

    def in_float32(self) -> AbstractContextManager[None]:
        """A block that changes nothing."""
        return nullcontext()

    def latents_of(self, images: np.ndarray) -> np.ndarray:
        """The images themselves."""
        return images

    images_of = latents_of


Codecs = CompiledAutoencoder | PixelCodec


def compiled_control(directory: Path, backbone: Any, other: Callable[[Any], Any]) -> CompiledControl | None:
    """The ControlNet of a checked folder for a compiled backbone; None without an export. Raises ModelError.

    other: a torch model -> the same by torch.
    """
    if (export := exported(directory)) is None:
        return None
    skips, own = export.record["control"]["skips"], backbone.record["skips"]
    if skips != own:
        raise ModelError(f"a ControlNet for another model: it adds to {skips}, the U-Net has {own} ({directory})")
    return CompiledControl(Compiler(export, backbone.dtype, network_hash(directory)), export.record["control"], other)


class Compiled(NamedTuple):
    """The networks of an export, and the text encoders inside its encoder."""

    backbone: CompiledBackbone
    encoder: Any
    codec: Codecs
    texts: list[Any]


def compiled_networks(export: Exported, compiler: Compiler) -> Compiled:
    """The networks of an export; nothing is compiled yet. Raises ModelError."""
    facts, codec = export.record["backbone"], export.record["codec"]
    with loading(FOLDER, export.directory):
        backbone = (PackingBackbone if facts["packs"] else CompiledBackbone)(compiler, facts)
        encoder, texts = compiled_texts(export, compiler)
        if codec["kind"] == "identity":
            return Compiled(backbone, encoder, PixelCodec(int(codec["image_channels"])), texts)
        return Compiled(
            backbone, encoder, (ShowingAutoencoder if codec["shows"] else CompiledAutoencoder)(compiler, codec), texts
        )


def begin(networks: Compiled, latents: tuple[int, ...], conditions: int, deep: bool) -> None:
    """Begin to compile for latents (B, C, h, w) and prompts of one chunk, the slowest part first."""
    networks.backbone.begin(conditions * latents[0], latents[2:], networks.encoder.length, deep=deep)
    for text in networks.texts:
        text.begin()
    networks.codec.begin(latents)
