"""The networks of a model by OpenVINO on a CPU: NumPy arrays in and out, without torch.

They satisfy the protocols of `networks.protocols`, so that the same samplers and guidance run with both. In bfloat16
products have 8 bits of mantissa and are summed in float32; inputs and outputs are always float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from latentdiff.core.errors import ModelError, loading
from latentdiff.core.turn import Turn
from latentdiff.formats.folder import read_json
from latentdiff.networks.conditions import Conditions
from latentdiff.networks.encoders.joined import with_both
from latentdiff.networks.encoders.prompt import EMPTY, Prompt, Reader, Reading, Style, check_clip_skip, weighted
from latentdiff.networks.protocols import Spec
from latentdiff.runtime.compiling import Compiler
from latentdiff.runtime.graphs import FOLDER, TOKENIZER, Exported


class CompiledUNet:
    """(x_t, t, conditions) -> output; see networks.backbones.unet.UNet."""

    def __init__(self, compiler: Compiler, record: dict[str, Any]):
        self._compiler, self.dtype = compiler, compiler.precision
        reads = {name: tuple(shape) for name, shape in record["reads"].items()}
        self.spec = Spec(int(record["inputs"]), int(record["outputs"]), reads=reads)
        self.deep_levels = int(record["deep_levels"])

    def begin(self, rows: int, size: tuple[int, ...], tokens: int, part: str = "unet") -> None:
        """Begin to compile for latents of (h, w). For SDXL this waits until a prompt has been read."""
        if "sizes" not in self.spec.reads:
            x, context = (rows, self.spec.inputs, *size), (rows, tokens, int(self.spec.reads["tokens"][1] or 0))
            self._compiler.begin(part, (x, (1,), context))

    def predict(self, x: np.ndarray, t: float, conditions: Conditions) -> np.ndarray:
        """See Backbone."""
        return self._run("unet", x, t, conditions)[0]

    def predict_from(
        self, x: np.ndarray, t: float, conditions: Conditions, deep: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """See DeepFeatures."""
        if deep is not None:
            return self._run("unet_shallow", x, t, conditions, deep)[0], deep
        output, deep = self._run("unet_deep", x, t, conditions)
        return output, deep

    def _run(self, part: str, x: np.ndarray, t: float, conditions: Conditions, *more: np.ndarray) -> list[np.ndarray]:
        """The outputs of a graph, the first like x, or (K, B, C, h, w) under K conditions."""
        copies, count = conditions.count or 1, conditions.count
        flat = conditions.flattened() if count else conditions
        arrays = [flat[name] for name in self.spec.reads]
        inputs = [np.concatenate([x] * copies), np.array([t], np.float32), *more, *arrays]
        output, *rest = self._compiler.run(part, *(np.asarray(array, np.float32) for array in inputs))
        return [output.reshape(count, len(x), *output.shape[1:]) if count else output, *rest]


class CompiledAutoencoder:
    """images (B, C, H, W) in [-1, 1] <-> latents; see networks.codecs.autoencoder.Autoencoder."""

    def __init__(self, compiler: Compiler, record: dict[str, Any]):
        self._compiler, self.dtype = compiler, compiler.precision
        self.factor, self.latent_channels = int(record["factor"]), int(record["latent_channels"])
        self.image_channels, self._slices, self._turn = int(record["image_channels"]), False, Turn()

    def shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """See Codec."""
        return self.latent_channels, size[0] // self.factor, size[1] // self.factor

    def begin(self, latents: tuple[int, ...]) -> None:
        """Begin to compile the decoder for latents of that shape, (B, C, h, w)."""
        self._compiler.begin("vae_decoder", (latents,))

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
        return self._run("vae_encoder", images)

    def images_of(self, latents: np.ndarray) -> np.ndarray:
        """Images about in [-1, 1]."""
        return self._run("vae_decoder", latents)

    def _run(self, part: str, batch: np.ndarray) -> np.ndarray:
        with self._turn:
            pieces = [row[None] for row in batch] if self._slices else [batch]
        return np.concatenate([self._compiler.run(part, np.asarray(piece, np.float32))[0] for piece in pieces])


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


class CompiledTextEncoder:
    """Prompts -> conditions; see networks.encoders.clip.TextEncoder."""

    def __init__(self, compiler: Compiler, part: str, record: dict[str, Any], tokenizer: Path, words: int):
        self._compiler, self._part, self._tokenizer, self._words = compiler, part, tokenizer, words
        self._record, self.layers, self.length = record, int(record["layers"]), int(record["length"])

    @cached_property
    def reader(self) -> Reader:
        """The vocabulary of the tokenizer's file."""
        from tokenizers import Tokenizer

        with loading(self._tokenizer):
            words = Tokenizer.from_file(str(self._tokenizer))
        words.no_truncation()
        words.no_padding()
        start, end, pad = (int(self._record[name]) for name in ("start", "end", "pad"))
        return Reader(lambda text: words.encode(text, add_special_tokens=False).ids, start, end, pad, self.length)

    def begin(self) -> None:
        """Begin to compile for one chunk."""
        self._compiler.begin(self._part, ((1, self.length),))

    def read(self, prompt: str, style: Style = Style()) -> Reading:  # noqa: B008 - frozen
        """See TextEncoder.read."""
        return self.reader.read(prompt, style)

    def encode(self, prompt: Prompt) -> Conditions:
        """See TextEncoder.encode."""
        check_clip_skip(prompt.style, self.layers)
        chunks = self.reader.filled(prompt.text, prompt.style, prompt.chunks)
        hidden, pooled = self._hidden(self.reader.ids(chunks), prompt.style)
        weights = self.reader.weights(chunks)
        if (weights != 1).any():
            empty, _ = self._hidden(self.reader.ids([EMPTY]), prompt.style)
            hidden = weighted(hidden, empty, weights)
        tokens = {"tokens": hidden.reshape(-1, hidden.shape[-1])}
        return Conditions(tokens if pooled is None else tokens | {"pooled": pooled[0]})

    def _hidden(self, ids: np.ndarray, style: Style) -> tuple[np.ndarray, np.ndarray | None]:
        """Hidden states (n, L, D) of chunks, each computed by itself, and the pooled text (n, P) if there is one."""
        if ids.max() >= self._words:  # the graph would read another word's row
            raise ModelError(f"{self._tokenizer.parent.name} does not fit the text encoder's {self._words} words")
        rows = [self._compiler.run(self._part, row[None]) for row in ids]
        outputs = [np.concatenate(column) for column in zip(*rows, strict=True)]
        pooled = outputs[self.layers] if len(outputs) > self.layers else None
        return outputs[style.clip_skip or 0], pooled


class CompiledTextEncoders:
    """SDXL's two; see networks.encoders.two_clips.TwoTextEncoders."""

    def __init__(self, first: CompiledTextEncoder, second: CompiledTextEncoder, *, zero_empty: bool):
        self.first, self.second, self.zero_empty = first, second, zero_empty
        self.length, self.read = first.length, first.read

    def begin(self) -> None:
        """Begin to compile both."""
        self.first.begin()
        self.second.begin()

    def encode(self, prompt: Prompt) -> Conditions:
        """See TwoTextEncoders.encode."""
        return with_both(self.first.encode(prompt), self.second.encode(prompt), prompt, zero_empty=self.zero_empty)


Codecs = CompiledAutoencoder | PixelCodec
TextEncoders = CompiledTextEncoder | CompiledTextEncoders


def compiled_networks(export: Exported, compiler: Compiler) -> tuple[CompiledUNet, TextEncoders, Codecs]:
    """Backbone, encoder and codec of an export; nothing is compiled yet. Raises ModelError."""
    record = export.record
    with loading(FOLDER, export.directory):
        unet = CompiledUNet(compiler, record["unet"])
        codec: Codecs = PixelCodec(unet.spec.outputs)
        if "vae" in record["configs"]:
            codec = CompiledAutoencoder(compiler, record["vae"])
        texts = [
            CompiledTextEncoder(compiler, part, record[part], export.tokenizer(part), words_of(export, part))
            for part in TOKENIZER
            if part in record["configs"]
        ]
        if len(texts) == 1:
            return unet, texts[0], codec
        return unet, CompiledTextEncoders(*texts, zero_empty=record["zero_empty"]), codec


def words_of(export: Exported, part: str) -> int:
    """The size of a text encoder's vocabulary."""
    return int(read_json(export.directory / part / "config.json")["vocab_size"])


def begin(
    unet: CompiledUNet,
    texts: TextEncoders,
    codec: Codecs,
    latents: tuple[int, ...],
    conditions: int,
    deep: bool,
) -> None:
    """Begin to compile for latents (B, C, h, w) and prompts of one chunk, the slowest part first."""
    unet.begin(conditions * latents[0], latents[2:], texts.length, "unet_deep" if deep else "unet")
    texts.begin()
    codec.begin(latents)
