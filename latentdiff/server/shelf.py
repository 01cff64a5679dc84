"""The models and the adapters that clients may choose by name, and the models that are loaded.

Names are those of two folders that the user named at the start; a request never holds a path. A model with adapters
is loaded apart from the model alone, since adapters are added to the weights.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from latentdiff.core.errors import ConfigError
from latentdiff.drawing.request import LONGEST_PROMPT
from latentdiff.pipeline import LatentDiffusionPipeline

_TAG = re.compile(r"<lora:([^<>]*)>")  # A1111's


class Adapter(NamedTuple):
    """An adapter by its name, and its weight."""

    name: str
    weight: float = 1.0


class Wanted(NamedTuple):
    """What a request draws with. torch: whether its settings require torch's networks."""

    model: str
    adapters: tuple[Adapter, ...] = ()
    torch: bool = False


Open = Callable[[Path | None, bool], LatentDiffusionPipeline]


class Shelf:
    """See the module.

    first: the model of the start. open_: opens a model again, by its path or (None) the model of the start, with
    torch's networks or the runtime of the start. keep: models in memory; the one that was used least lately goes.
    """

    def __init__(
        self,
        first: LatentDiffusionPipeline,
        open_: Open,
        models: Path | None = None,
        adapters: Path | None = None,
        keep: int = 2,
    ):
        self.current = self.first = first.card.name
        self._open, self._models, self._adapters, self._keep = open_, models, adapters, keep
        self._loaded = OrderedDict({Wanted(self.first): first})
        self._turn = threading.Lock()

    def names(self) -> list[str]:
        """The models that may be chosen, the one of the start first."""
        return [self.first, *(name for name in _places(self._models, "model_index.json") if name != self.first)]

    def adapters(self) -> list[str]:
        """The adapters that may be chosen."""
        return list(_places(self._adapters, "*.safetensors"))

    def hash_of(self, name: str) -> str | None:
        """The hash of a model that is loaded."""
        pipe = self._loaded.get(Wanted(name))
        return None if pipe is None else pipe.card.hash

    def loaded(self, wanted: Wanted) -> LatentDiffusionPipeline | None:
        """The model if it is in memory: then nobody has to wait."""
        with suppress(KeyError):  # another thread may take it away meanwhile
            self._loaded.move_to_end(wanted)
        return self._loaded.get(wanted)

    def take(self, wanted: Wanted) -> LatentDiffusionPipeline:
        """The model, loaded if need be. Raises ConfigError for an unknown name, ModelError."""
        with self._turn:
            if wanted not in self._loaded:
                if len({each.name for each in wanted.adapters}) < len(wanted.adapters):
                    raise ConfigError("an adapter is named twice")
                model, adapters = self._model(wanted.model), [self._adapter(each.name) for each in wanted.adapters]
                while len(self._loaded) >= self._keep:  # before, so that memory never holds one more
                    self._loaded.popitem(last=False)
                pipe = self._open(model, wanted.torch or bool(adapters))
                pipe.rename(wanted.model)  # so that a picture's record names the model as clients do
                for path, adapter in zip(adapters, wanted.adapters, strict=True):
                    pipe.load_lora_weights(path, weight=adapter.weight, fuse=True)
                self._loaded[wanted] = pipe
            self._loaded.move_to_end(wanted)
            return self._loaded[wanted]

    def _model(self, name: str) -> Path | None:
        if name == self.first:
            return None
        return _chosen("model", name, _places(self._models, "model_index.json"))

    def _adapter(self, name: str) -> Path:
        return _chosen("adapter", name, _places(self._adapters, "*.safetensors"))


def _places(folder: Path | None, inside: str) -> dict[str, Path]:
    """The names of a folder: of its .safetensors files without suffix, and of the folders that hold `inside`."""
    if folder is None or not folder.is_dir():
        return {}
    entries = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    files = {path.stem: path for path in entries if path.suffix.lower() == ".safetensors" and path.is_file()}
    return files | {path.name: path for path in entries if path.is_dir() and any(path.glob(inside))}


def _chosen(kind: str, name: str, places: dict[str, Path]) -> Path:
    if name not in places:
        known = f"one of {', '.join(list(places)[:20])}" if places else f"no folder of {kind}s was named"
        raise ConfigError(f"unknown {kind} {name[:60]!r}; {known}")
    return places[name]


def without_tags(prompt: str) -> tuple[str, tuple[Adapter, ...]]:
    """A prompt without A1111's `<lora:NAME:WEIGHT>`, and the adapters that they name. Raises ConfigError."""
    if len(prompt) > LONGEST_PROMPT:  # which drawing refuses
        return prompt, ()
    *before, last = _TAG.split(prompt)
    texts, adapters = before[::2], tuple(_adapter(tag) for tag in before[1::2])
    return "".join(text.rstrip() for text in texts) + last, adapters


def _adapter(tag: str) -> Adapter:
    name, _, weight = tag.partition(":")
    try:
        number = float(weight or 1)
    except ValueError:
        number = float("nan")
    if not -10 <= number <= 10:
        raise ConfigError(f"<lora:{tag[:60]}> must be <lora:NAME:WEIGHT> with a weight from -10 to 10")
    return Adapter(name, number)
