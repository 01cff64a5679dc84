"""The models, adapters and ControlNets that clients may choose by name, and the models that are loaded.

Names are those of folders that the user named at the start; a request never holds a path. A model with adapters
is loaded apart from the model alone, since adapters are added to the weights.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Set
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from latentdiff.core.errors import ConfigError, DataError, LatentDiffError, ModelError, UnsafeError
from latentdiff.drawing.extras import few_steps_at
from latentdiff.drawing.request import LONGEST_PROMPT
from latentdiff.pipeline import LatentDiffusionPipeline

_TAG = re.compile(r"<lora:([^<>]*)>")  # A1111's


class Adapter(NamedTuple):
    """An adapter by its name, and its weight."""

    name: str
    weight: float = 1.0


class Wanted(NamedTuple):
    """What a request draws with. torch: whether its settings require torch's networks. controls: ControlNets.

    fast: whether the model's student of few steps draws.
    """

    model: str
    adapters: tuple[Adapter, ...] = ()
    torch: bool = False
    controls: tuple[str, ...] = ()
    fast: bool = False


_Key = tuple[Wanted, tuple[tuple[int, int, int], ...]]
MOST_FAILED = 100  # models that did not load and are remembered
Open = Callable[[Path | None, bool], LatentDiffusionPipeline]


class Shelf:
    """See the module.

    first: the model of the start. open_: opens a model again, by its path or (None) the model of the start, with
    torch's networks or the runtime of the start. keep: models in memory; the least recently used one is dropped.
    """

    def __init__(
        self,
        first: LatentDiffusionPipeline,
        open_: Open,
        models: Path | None = None,
        adapters: Path | None = None,
        keep: int = 2,
        controls: Path | None = None,
    ):
        self.current = self.first = first.card.name
        self.keep = keep
        self.own = frozenset(each.sha256 for each in first.painter.sources.values())  # always beside the first model
        self._open, self._models, self._adapters, self._controls = open_, models, adapters, controls
        self._hashes, self._first_folder = {self.first: first.card.hash}, first.card.folder
        self._failed: OrderedDict[_Key, LatentDiffError] = OrderedDict()
        self._turn = threading.Lock()
        self._check_first(first.card.folder)
        self._loaded = OrderedDict({self._key(Wanted(self.first)): first})

    def names(self) -> list[str]:
        """The models that may be chosen, the one of the start first."""
        return [self.first, *(name for name in _places(self._models, "model_index.json") if name != self.first)]

    def adapters(self) -> list[str]:
        """The adapters that may be chosen."""
        return list(_places(self._adapters, "*.safetensors"))

    def controls(self) -> list[str]:
        """The ControlNets that may be chosen."""
        return list(_places(self._controls, "config.json"))

    def unknown(self, name: object) -> ConfigError:
        """The error for a name that is no model's."""
        return ConfigError(f"unknown model {str(name)[:60]!r}; one of {', '.join(self.names()[:20])}")

    def hash_of(self, name: str) -> str | None:
        """The hash of a model that has been loaded."""
        return self._hashes.get(name)

    def loaded(self, wanted: Wanted) -> LatentDiffusionPipeline | None:
        """The model if it is in memory: then nobody has to wait. Raises ConfigError for an unknown name."""
        key = self._key(wanted)
        with suppress(KeyError):  # another thread may take it away meanwhile
            self._loaded.move_to_end(key)
        return self._loaded.get(key)

    def take(self, wanted: Wanted, used: Set[int] = frozenset()) -> LatentDiffusionPipeline:
        """The model, loaded if need be. Raises ConfigError for an unknown name, ModelError.

        used: the ids of painters that keep their place, since dropping them would free no memory. What could not be
        loaded fails again at once, as long as its files are the same: it costs no other model's place.
        """
        key = self._key(wanted)
        with self._turn:
            if key in self._failed:
                raise self._failed[key].with_traceback(None)  # each raise would add frames, with their pictures
            if key not in self._loaded:
                while len(self._loaded) >= self.keep:  # before, so that memory never holds one more
                    unused = (key for key, pipe in self._loaded.items() if id(pipe.painter) not in used)
                    del self._loaded[next(unused, next(iter(self._loaded)))]
                try:
                    self._loaded[key] = self._opened(wanted)
                except (ConfigError, DataError, ModelError, UnsafeError) as error:  # not for lack of memory
                    self._failed[key] = error
                    if len(self._failed) > MOST_FAILED:
                        self._failed.popitem(last=False)
                    raise
            self._loaded.move_to_end(key)
            return self._loaded[key]

    def _opened(self, wanted: Wanted) -> LatentDiffusionPipeline:
        pipe = self._open(self._model(wanted.model), wanted.torch)
        pipe.rename(wanted.model)  # so that a picture's record names the model as clients do
        if wanted.fast:
            pipe.load_few_steps()
        for adapter in wanted.adapters:
            pipe.load_lora_weights(self._adapter(adapter.name), weight=adapter.weight, fuse=True)
        for control in wanted.controls:
            pipe.load_controlnet(self._control(control))
        if not (wanted.adapters or wanted.controls or wanted.fast):
            self._hashes[wanted.model] = pipe.card.hash
        return pipe

    def _key(self, wanted: Wanted) -> _Key:
        """What is wanted, and the states of its files: a file that is replaced is another one. Raises ConfigError."""
        if len({each.name for each in wanted.adapters}) < len(wanted.adapters):
            raise ConfigError("an adapter is named twice")
        model = self._model(wanted.model)
        files = [] if model is None else _files(model, "*")
        if wanted.fast and (student := few_steps_at(self._first_folder if model is None else model)) is not None:
            files.append(student)
        for adapter in wanted.adapters:
            files += _files(self._adapter(adapter.name), "*.safetensors")
        for control in wanted.controls:
            files += _files(self._control(control), "*")
        return wanted, tuple(_state(file) for file in files)

    def _check_first(self, folder: Path | None) -> None:
        """Raises ConfigError if the folder of models has another model of the first one's name."""
        other = _places(self._models, "model_index.json").get(self.first)
        if other is not None and folder is not None and other.resolve() != folder.resolve():
            raise ConfigError(f"two models are called {self.first}: {folder} and {other}. Rename one of the folders")

    def _model(self, name: str) -> Path | None:
        if name == self.first:
            return None
        places = _places(self._models, "model_index.json")
        if name not in places:
            raise self.unknown(name)
        return places[name]

    def _adapter(self, name: str) -> Path:
        return _named(name, _places(self._adapters, "*.safetensors"), "adapter")

    def _control(self, name: str) -> Path:
        return _named(name, _places(self._controls, "config.json"), "ControlNet")


def _files(path: Path, pattern: str) -> list[Path]:
    """A file, or those of a folder and of the folders in it."""
    return [path] if path.is_file() else sorted(file for file in path.rglob(pattern) if file.is_file())


def _state(file: Path) -> tuple[int, int, int]:
    """What changes when a file is replaced; zeros for a file that is gone."""
    try:
        state = file.stat()
    except OSError:
        return 0, 0, 0
    return state.st_mtime_ns, state.st_size, state.st_ino


def _named(name: str, places: Mapping[str, Path], what: str) -> Path:
    """The place of a name. Raises ConfigError."""
    if name not in places:
        known = f"one of {', '.join(list(places)[:20])}" if places else f"no folder of {what}s was named"
        raise ConfigError(f"unknown {what} {name[:60]!r}; {known}")
    return places[name]


def _places(folder: Path | None, inside: str) -> dict[str, Path]:
    """The names of a folder: of its .safetensors files without suffix, and of the folders that hold `inside`.

    Names that are not valid text are left out.
    """
    if folder is None or not folder.is_dir():
        return {}
    entries = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".") and is_text(path.name)]
    files = {path.stem: path for path in entries if path.suffix.lower() == ".safetensors" and path.is_file()}
    return files | {path.name: path for path in entries if path.is_dir() and any(path.glob(inside))}


def is_text(name: str) -> bool:
    """Whether a file's name is text, and not bytes of another encoding."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


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
