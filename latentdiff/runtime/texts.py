"""Text encoders by OpenVINO: tokenizers of the library of that name, and graphs; see networks/encoders."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from latentdiff.core.errors import ModelError, loading
from latentdiff.core.turn import Turn
from latentdiff.networks.conditions import Conditions
from latentdiff.networks.encoders.prompt import EMPTY, Prompt, Reader, Reading, Style, check_clip_skip, weighted
from latentdiff.networks.encoders.reading import (
    PLAIN,
    Chat,
    ChatReading,
    ClassReading,
    ClipAndT5Reading,
    SecondReading,
    T5Reading,
    ThreeReading,
    TwoReading,
)
from latentdiff.runtime.compiling import Compiler
from latentdiff.runtime.graphs import Exported

CHAT_STEP = 64  # graphs read chats in a number of tokens that is a multiple of this


class _Text:
    """The graph of a text encoder, and the tokenizer that makes its ids."""

    def __init__(self, compiler: Compiler, part: str, record: dict[str, Any], tokenizer: Path):
        self._compiler, self._part, self._record, self._tokenizer = compiler, part, record, tokenizer
        self._turn = Turn()

    @cached_property
    def _backend(self) -> Any:
        from tokenizers import Tokenizer

        with loading(self._tokenizer):
            words = Tokenizer.from_file(str(self._tokenizer))
        words.no_truncation()
        words.no_padding()
        return words

    def _run(self, ids: np.ndarray, **more: np.ndarray) -> list[np.ndarray]:
        """The outputs for ids (1, L)."""
        most = int(self._record["words"])
        if ids.max() >= most:  # the graph would read another word's row
            raise ModelError(f"{self._tokenizer.parent.name} does not fit the text encoder's {most} words")
        return self._compiler.run(self._part, {"ids": ids, **more})


class CompiledClip(_Text):
    """Prompts -> conditions; see networks.encoders.clip.TextEncoder."""

    @property
    def layers(self) -> int:
        """The number of layers that can be read."""
        return int(self._record["layers"])

    @property
    def length(self) -> int:
        """The number of tokens of a chunk, with start and end."""
        return int(self._record["length"])

    @cached_property
    def reader(self) -> Reader:
        """The vocabulary of the tokenizer's file."""
        words = self._backend
        start, end, pad = (int(self._record[name]) for name in ("start", "end", "pad"))
        return Reader(lambda text: words.encode(text, add_special_tokens=False).ids, start, end, pad, self.length)

    def begin(self) -> None:
        """Begin to compile for one chunk."""
        self._compiler.begin(self._part, (("ids", (1, self.length)),))

    def read(self, prompt: str, style: Style = PLAIN) -> Reading:
        """See TextEncoder.read."""
        return self.reader.read(prompt, style)

    def encode(self, prompt: Prompt) -> Conditions:
        """See TextEncoder.encode."""
        check_clip_skip(prompt.style, self.layers)
        chunks = self.reader.padded(prompt.text, prompt.style, prompt.chunks)
        hidden, pooled = self._hidden(self.reader.ids(chunks), prompt.style)
        weights = self.reader.weights(chunks)
        if (weights != 1).any():
            empty, _ = self._hidden(self.reader.ids([EMPTY]), prompt.style)
            hidden = weighted(hidden, empty, weights)
        tokens = {"tokens": hidden.reshape(-1, hidden.shape[-1])}
        return Conditions(tokens | {"pooled": pooled[0]} if self._record["projects"] else tokens)

    def pooled(self, prompt: Prompt) -> np.ndarray:
        """See TextEncoder.pooled."""
        return self._hidden(self.reader.ids(self.reader.padded(prompt.text, prompt.style, 1)[:1]), PLAIN)[1][0]

    def _hidden(self, ids: np.ndarray, style: Style) -> tuple[np.ndarray, np.ndarray]:
        """Hidden states (n, L, D) of chunks, each computed by itself, and their pooled texts (n, P)."""
        rows = [self._run(row[None]) for row in ids]
        outputs = [np.concatenate(column) for column in zip(*rows, strict=True)]
        return outputs[style.clip_skip or 0], outputs[-1]


class CompiledT5(_Text, T5Reading):
    """See T5Reading."""

    @property
    def length(self) -> int:  # type: ignore[override]
        """See T5Reading."""
        return int(self._record["length"])

    @property
    def pad(self) -> int:  # type: ignore[override]
        """See T5Reading."""
        return int(self._record["pad"])

    def begin(self) -> None:
        """Begin to compile for its one length."""
        self._compiler.begin(self._part, (("ids", (1, self.length)),))

    def words(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """See T5Reading."""
        read = self._backend.encode(text)
        return read.ids, read.offsets

    def states(self, ids: list[int]) -> np.ndarray:
        """See T5Reading."""
        return self._run(np.array([ids], np.int64))[0]


class CompiledChat(_Text, ChatReading):
    """See ChatReading."""

    @cached_property
    def chat(self) -> Chat:  # type: ignore[override]
        """See ChatReading."""
        chat = dict(self._record["chat"])
        return Chat(reads_padding=chat.pop("filled"), **chat)

    @property
    def pad(self) -> int:  # type: ignore[override]
        """See ChatReading."""
        return int(self._record["pad"])

    def begin(self) -> None:
        """Begin to compile, if every prompt has the same length."""
        if self.chat.reads_padding:
            shape = (1, -(-(self.length + self.chat.dropped) // CHAT_STEP) * CHAT_STEP)
            self._compiler.begin(self._part, (("ids", shape), ("marks", shape)))

    def words(self, text: str) -> list[int]:
        """See ChatReading."""
        ids: list[int] = self._backend.encode(text).ids
        return ids

    def states(self, ids: list[int], marks: list[int]) -> np.ndarray:
        """See ChatReading. Padding after the last token changes none before it: each sees only earlier ones."""
        more = -len(ids) % CHAT_STEP
        rows = (np.array([[*each, *[filler] * more]], np.int64) for each, filler in ((ids, self.pad), (marks, 0)))
        read, marked = rows
        return self._run(read, marks=marked)[0][0, : len(ids)]


_KINDS: dict[str, Any] = {"clip": CompiledClip, "t5": CompiledT5, "chat": CompiledChat}
_READINGS: dict[str, Any] = {
    "classes": ClassReading,
    "two": TwoReading,
    "second": SecondReading,
    "clip_and_t5": ClipAndT5Reading,
    "three": ThreeReading,
}


def compiled_texts(export: Exported, compiler: Compiler) -> tuple[Any, list[Any]]:
    """The encoder of an export, and the text encoders inside it; nothing is compiled yet."""
    record: Mapping[str, Any] = export.record
    texts = [
        _KINDS[facts["kind"]](compiler, part, facts, export.tokenizer(part)) for part, facts in record["texts"].items()
    ]
    kind, options = record["encoder"]["kind"], record["encoder"]["options"]
    if kind not in _READINGS:
        return texts[0], texts
    lacking = [None] * (kind == "three" and len(texts) == 2)
    return _READINGS[kind](*texts, *lacking, **options), texts
