"""The networks of a model by OpenVINO, on a CPU: NumPy arrays in and out, and no torch.

They answer to what drawing asks of torch's (models/), so that the same pipeline, samplers and guidance run on both.
In bfloat16 products are computed with 8 bits of mantissa and summed in float32; all that comes in and out is float32.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from latentdiff.core.errors import ModelError, loading
from latentdiff.formats.folder import read_json
from latentdiff.networks.conditions import Context, side_by_side
from latentdiff.networks.encoders.prompt import EMPTY, Reader, Reading, Style, check_clip_skip, weighted
from latentdiff.runtime.compiling import Compiler
from latentdiff.runtime.graphs import FOLDER, TOKENIZER, Exported


class CompiledUNet:
    """(x_t, t, context) -> output; see models.unet.UNet."""

    can_be_perturbed = False  # its attention is within the graph

    def __init__(self, compiler: Compiler, told: dict[str, Any]):
        self._compiler, self.dtype = compiler, compiler.precision
        self.factor, self.in_channels = int(told["factor"]), int(told["in_channels"])
        self.context_width, self.reads_sizes = int(told["context_width"]), bool(told["reads_sizes"])
        self.has_deep = bool(told["has_deep"])

    def begin(self, rows: int, size: tuple[int, ...], tokens: int, part: str = "unet") -> None:
        """Begin to compile for latents of (h, w); of SDXL the shapes are known when a prompt has been read."""
        if not self.reads_sizes:
            x, context = (rows, self.in_channels, *size), (rows, tokens, self.context_width)
            self._compiler.begin(part, (x, (1,), context))

    def prepared(self, context: Context) -> Context:
        """As it is."""
        return context

    def predict(self, x: np.ndarray, t: float, context: Context) -> np.ndarray:
        """See UNet.predict: x (B, C, h, w), context (B, L, D), or (K, B, L, D) for an output (K, B, C, h, w)."""
        return self._run("unet", x, t, context)[0]

    def predict_from(
        self, x: np.ndarray, t: float, context: Context, deep: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """See UNet.predict_from."""
        if deep is not None:
            return self._run("unet_shallow", x, t, context, deep)[0], deep
        output, deep = self._run("unet_deep", x, t, context)
        return output, deep

    def _run(self, part: str, x: np.ndarray, t: float, context: Context, *more: np.ndarray) -> list[np.ndarray]:
        """The outputs of a graph, the first like x, or (K, B, C, h, w) under K conditions."""
        many = context.tokens.ndim == 4
        told, copies = (context.flattened(), len(context.tokens)) if many else (context, 1)
        added = [told.pooled, told.sizes] if self.reads_sizes else []
        inputs = [np.concatenate([x] * copies), np.array([t], np.float32), *more, told.tokens, *added]
        output, *rest = self._compiler.run(part, *(np.asarray(array, np.float32) for array in inputs))
        return [output.reshape(copies, len(x), *output.shape[1:]) if many else output, *rest]


class CompiledAutoencoder:
    """images (B, C, H, W) in [-1, 1] <-> latents; see models.autoencoder.Autoencoder."""

    def __init__(self, compiler: Compiler, told: dict[str, Any]):
        self._compiler, self.dtype = compiler, compiler.precision
        self.factor, self.latent_channels = int(told["factor"]), int(told["latent_channels"])
        self.image_channels, self._slices = int(told["image_channels"]), False

    def begin(self, latents: tuple[int, ...]) -> None:
        """Begin to compile the decoder for latents of that shape, (B, C, h, w)."""
        self._compiler.begin("vae_decoder", (latents,))

    def piecewise(self, *, tiles: bool, slices: bool) -> None:
        """One picture of a batch at a time; in tiles only torch's computes."""
        assert not tiles
        self._slices = slices

    def in_float32(self) -> AbstractContextManager[None]:
        """It has float32's range already."""
        return nullcontext()

    def latents_of(self, images: np.ndarray) -> np.ndarray:
        """The posterior's mean."""
        return self._run("vae_encoder", images)

    def images_of(self, latents: np.ndarray) -> np.ndarray:
        """Images about in [-1, 1]."""
        return self._run("vae_decoder", latents)

    def _run(self, part: str, batch: np.ndarray) -> np.ndarray:
        pieces = [row[None] for row in batch] if self._slices else [batch]
        return np.concatenate([self._compiler.run(part, np.asarray(piece, np.float32))[0] for piece in pieces])


class PixelAutoencoder:
    """No compression: the latents are the pixels; see models.autoencoder.IdentityAutoencoder."""

    factor, dtype = 1, "float32"

    def __init__(self, channels: int):
        self.latent_channels = self.image_channels = channels

    def begin(self, latents: tuple[int, ...]) -> None:
        """Nothing to compile."""

    def piecewise(self, *, tiles: bool, slices: bool) -> None:
        """Nothing to compute, in pieces or not."""

    def latents_of(self, images: np.ndarray) -> np.ndarray:
        """The images themselves."""
        return images

    images_of = latents_of


class CompiledTextEncoder:
    """Prompts -> context; see models.text_encoder.TextEncoder."""

    def __init__(self, compiler: Compiler, part: str, told: dict[str, Any], tokenizer: Path, words: int):
        self._compiler, self._part, self._tokenizer, self._words = compiler, part, tokenizer, words
        self._told, self.layers, self.max_length = told, int(told["layers"]), int(told["length"])

    @cached_property
    def reader(self) -> Reader:
        """Its words, as the tokenizer's file has them."""
        from tokenizers import Tokenizer

        with loading(self._tokenizer):
            words = Tokenizer.from_file(str(self._tokenizer))
        words.no_truncation()
        words.no_padding()
        start, end, pad = (int(self._told[name]) for name in ("start", "end", "pad"))
        return Reader(lambda text: words.encode(text, add_special_tokens=False).ids, start, end, pad, self.max_length)

    def begin(self) -> None:
        """Begin to compile for one chunk."""
        self._compiler.begin(self._part, ((1, self.max_length),))

    def read(self, prompt: str, style: Style = Style()) -> Reading:  # noqa: B008 - frozen
        """See TextEncoder.read."""
        return self.reader.read(prompt, style)

    def context(self, prompt: str, style: Style = Style(), *, least: int = 1) -> Context:  # noqa: B008 - frozen
        """See TextEncoder.context."""
        check_clip_skip(style, self.layers)
        found = self.reader.filled(prompt, style, least)
        hidden, pooled = self._hidden(self.reader.ids(found), style)
        weights = self.reader.weights(found)
        if (weights != 1).any():
            empty, _ = self._hidden(self.reader.ids([EMPTY]), style)
            hidden = weighted(hidden, empty, weights)
        return Context(hidden.reshape(-1, hidden.shape[-1]), None if pooled is None else pooled[0])

    def _hidden(self, ids: np.ndarray, style: Style) -> tuple[np.ndarray, np.ndarray | None]:
        """Hidden states (n, L, D) of chunks, each by itself, and the pooled text (n, P) where there is one."""
        if ids.max() >= self._words:  # the graph would take another word's row
            raise ModelError(f"{self._tokenizer.parent.name} does not fit the text encoder's {self._words} words")
        rows = [self._compiler.run(self._part, row[None]) for row in ids]
        outputs = [np.concatenate(column) for column in zip(*rows, strict=True)]
        pooled = outputs[self.layers] if len(outputs) > self.layers else None
        return outputs[style.clip_skip or 0], pooled


class CompiledTextEncoders:
    """SDXL's two; see models.dual_text_encoder.DualTextEncoder."""

    def __init__(self, first: CompiledTextEncoder, second: CompiledTextEncoder, *, zero_empty: bool):
        self.first, self.second, self.zero_empty = first, second, zero_empty
        self.max_length, self.read = first.max_length, first.read

    def begin(self) -> None:
        """Begin to compile both."""
        self.first.begin()
        self.second.begin()

    def context(self, prompt: str, style: Style = Style(), *, least: int = 1) -> Context:  # noqa: B008 - frozen
        """See DualTextEncoder.context."""
        context = side_by_side(*(one.context(prompt, style, least=least) for one in (self.first, self.second)))
        return context.zeros() if self.zero_empty and not prompt else context


Autoencoders = CompiledAutoencoder | PixelAutoencoder
TextEncoders = CompiledTextEncoder | CompiledTextEncoders


def networks_of(model: Exported, compiler: Compiler) -> tuple[Autoencoders, TextEncoders, CompiledUNet]:
    """The networks of an export, as a pipeline takes them; nothing is compiled yet. Raises ModelError."""
    told = model.record
    with loading(FOLDER, model.directory):
        unet = CompiledUNet(compiler, told["unet"])
        autoencoder: Autoencoders = PixelAutoencoder(unet.in_channels)
        if "vae" in told["configs"]:
            autoencoder = CompiledAutoencoder(compiler, told["vae"])
        texts = [
            CompiledTextEncoder(compiler, part, told[part], model.tokenizer(part), words_of(model, part))
            for part in TOKENIZER
            if part in told["configs"]
        ]
        if len(texts) == 1:
            return autoencoder, texts[0], unet
        return autoencoder, CompiledTextEncoders(*texts, zero_empty=told["zero_empty"]), unet


def words_of(model: Exported, part: str) -> int:
    """How many words a text encoder knows."""
    return int(read_json(model.directory / part / "config.json")["vocab_size"])


def begin(
    autoencoder: Autoencoders,
    texts: TextEncoders,
    unet: CompiledUNet,
    latents: tuple[int, ...],
    conditions: int,
    deep: bool,
) -> None:
    """Begin to compile for latents (B, C, h, w) under prompts of one chunk, first what takes longest."""
    unet.begin(conditions * latents[0], latents[2:], texts.max_length, "unet_deep" if deep else "unet")
    texts.begin()
    autoencoder.begin(latents)
