"""Graphs compiled for fixed shapes on this CPU and cached in the user's directory for the next start.

The cached file is named by a hash of everything it depends on: graph, weights, shapes, precision, OpenVINO, processor.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from threading import RLock
from typing import Any, NamedTuple

import numpy as np

from latentdiff.core import cache as user_cache
from latentdiff.core.errors import TOO_LARGE, ModelError, ResourceError, loading
from latentdiff.runtime.graphs import FOLDER, WEIGHT, Changed, Exported, Stored, file_of, named

SHAPES = 4  # compiled versions of a graph in memory, each with its own weights; the oldest is dropped
LARGE = 32 * 32  # latents or pixels from which generated kernels pay off even if they run once
NARROW_LATENTS, NARROW_PICTURE = 8, 64  # columns below which bfloat16 is not used
HEAVY = 2**30  # bytes of weights from which only one compiled version of a graph stays in memory
Tensors = Mapping[str, Mapping[str, Changed]]  # by part and name
Shapes = tuple[tuple[str, tuple[int, ...]], ...]  # names and shapes of a graph's inputs, except its weights


def openvino() -> Any:
    """The library without its tools, which take longer to import than the rest and report each import to Intel."""
    if "openvino" not in sys.modules:
        tools = "openvino.tools.ovc"
        sys.modules[tools] = None  # type: ignore[assignment]  # to the library, not installed
        try:
            import openvino
        finally:
            del sys.modules[tools]
    import openvino

    return openvino


@cache
def _core() -> Any:
    return openvino().Core()


def has_bfloat16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this CPU. core/processor.py says it of torch."""
    return "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class Ready(NamedTuple):
    """An inference request, and the arrays that it reads but does not own."""

    request: Any
    held: list[np.ndarray]


class Compiler:
    """The graphs of one model in one precision; each is compiled once for each set of shapes, in its own thread."""

    def __init__(
        self,
        model: Exported,
        precision: str,
        model_hash: str | None = None,
        quantize: str | None = None,
        changed: Callable[[], Tensors] = dict,
    ):
        """model_hash: the hash of the weights; without it nothing is cached. quantize: see runtime/compressed.py.

        changed: returns tensors in place of the stored ones; it is called when a graph is compiled that is not cached.
        """
        self.model, self._model_hash, self.precision, self._quantize = model, model_hash, precision, quantize
        self._changed = cache(changed)
        self._begun: dict[tuple[str, Shapes], tuple[Future[Ready], user_cache.Kept | None]] = {}
        self._ready: dict[tuple[str, Shapes], Ready] = {}
        self._worker, self._turn = ThreadPoolExecutor(1, "compile"), RLock()

    def __deepcopy__(self, memo: object) -> Compiler:
        """Itself: copies of a model share its graphs, and callers take turns."""
        return self

    def changed(self, tensors: Callable[[], Tensors], key: str) -> Compiler:
        """A compiler whose graphs read these tensors in place of its own. key: names them in the cache."""

        def all_of() -> Tensors:
            before, own = self._changed(), tensors()
            return {part: {**before.get(part, {}), **own.get(part, {})} for part in before.keys() | own.keys()}

        known = self._model_hash and hashlib.sha256(f"{self._model_hash} {key}".encode()).hexdigest()
        return Compiler(self.model, self.precision, known, self._quantize, all_of)

    def begin(self, part: str, shapes: Shapes) -> None:
        """Begin to compile a part for shapes, unless that has begun already."""
        if (part, shapes) not in self._begun and (part, shapes) not in self._ready:
            file = user_cache.file(f"{self._key(part, shapes)}.blob") if self._model_hash else None
            kept = None if file is None else user_cache.kept(file)
            self._begun[part, shapes] = self._worker.submit(self._made, part, shapes, file, kept), kept

    def run(self, part: str, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """All outputs of a graph that is compiled for the shapes of these named inputs; threads take turns.

        Raises ModelError, ResourceError.
        """
        with self._turn, _memory_errors():
            return self._run(part, inputs)

    def _run(self, part: str, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        shapes = tuple((name, array.shape) for name, array in inputs.items())
        if (part, shapes) not in self._ready:
            for older in self._superfluous(part):
                del self._ready[older]
            self._ready[part, shapes] = self._made_ready(part, shapes)
        request = self._ready[part, shapes].request
        held = {name: np.ascontiguousarray(array) for name, array in inputs.items()}  # while the library reads them
        for name, array in held.items():
            request.set_tensor(name, openvino().Tensor(array, shared_memory=True))
        request.infer()
        return [tensor.data.copy() for tensor in request.output_tensors]

    def _superfluous(self, part: str) -> list[tuple[str, Shapes]]:
        """The oldest compiled versions of a graph, which have to go before another one is made."""
        made = [key for key in self._ready if key[0] == part]
        size = sum(stored.end - stored.begin for stored in self.model.weights(part).values()) if made else 0
        return made if size >= HEAVY else made[: 1 - SHAPES]

    def _made_ready(self, part: str, shapes: Shapes) -> Ready:
        """The request of a graph. A cached file is checked here while the other thread loads it."""
        self.begin(part, shapes)
        future, kept = self._begun.pop((part, shapes))
        if kept is None:
            return future.result()
        if kept.is_whole():
            with suppress(RuntimeError):  # a file of another version
                ready = future.result()
                kept.release()  # the library has copied the weights
                return ready
        return self._made(part, shapes, kept.file, None)

    def _made(self, part: str, shapes: Shapes, file: Path | None, kept: user_cache.Kept | None) -> Ready:
        """The request of a graph, from the cached file, or compiled and then written to it."""
        settings = self._settings(shapes)
        if kept is not None:
            compiled = _core().import_model(openvino().Tensor(kept.content), "CPU", settings)
            return Ready(compiled.create_infer_request(), [kept.content])
        with loading(f"{FOLDER}/{file_of(part)}", self.model.directory), _memory_errors():
            graph, held = self._bound(part, shapes)
            if kind := self._kind(part):
                from latentdiff.runtime.compressed import compressed

                graph = compressed(graph, kind)
            compiled = _core().compile_model(graph, "CPU", settings)
        if file is not None:
            user_cache.keep(file, compiled.export_model().getvalue())
        return Ready(compiled.create_infer_request(), held)

    def _settings(self, shapes: Shapes) -> dict[str, str]:
        """OpenVINO's settings for a part with these shapes.

        Snippets, kernels generated for groups of operations, make a step a fifth faster. They cost a small model a
        tenth of a second at the start. A few pictures save that again in the U-Net, but not in parts that run once a
        picture. In float32 their search for patterns crashes on some U-Nets (OpenVINO 2026.4).

        Pictures of few columns are computed in float32: at 1 to 4 columns of latents the library's kernels in bfloat16
        read numbers that nothing has written, and their outputs are NaN or change from run to run (OpenVINO 2026.4).
        """
        name, first = shapes[0]
        narrow = len(first) == 4 and first[3] < (NARROW_PICTURE if name == "images" else NARROW_LATENTS)
        precision = "float32" if narrow else self.precision
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": _PRECISIONS[precision]}
        often = name == "x" or (len(first) == 4 and first[2] * first[3] >= LARGE)  # the backbone's input is x
        return settings if often and precision != "float32" else settings | {"SNIPPETS_MODE": "DISABLE"}

    def _bound(self, part: str, shapes: Shapes) -> tuple[Any, list[np.ndarray]]:
        """A part's graph with its weights and shapes set, and the arrays of its weights."""
        graph, constants = self.model.graph(part)
        held = [constants]
        model = _core().read_model(graph, openvino().Tensor(constants))
        network = self.model.part(part)
        weights: dict[str, Stored | Changed] = {**self.model.weights(part), **self._changed().get(network, {})}
        for parameter in model.get_parameters():
            name = parameter.get_friendly_name()
            if name.startswith(WEIGHT):
                stored = named(weights, name.removeprefix(WEIGHT), network, self.model.directory)
                held.append(bind(parameter, stored))
                model.remove_parameter(parameter)
        model.reshape({name: list(shape) for name, shape in shapes})
        return model, held

    def _kind(self, part: str) -> str | None:
        """The kind of a part's quantized weights; a VAE's are few and are not quantized."""
        return None if self.model.part(part) == "vae" else self._quantize

    def _key(self, part: str, shapes: Shapes) -> str:
        ov = openvino()
        cpu = [_core().get_property("CPU", name) for name in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")]
        settings = self._settings(shapes)
        made_from = [self.model.identity(part), self._model_hash, shapes, settings, ov.__version__, cpu]
        made_from += [kind] if (kind := self._kind(part)) else []
        return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()


@contextmanager
def _memory_errors() -> Iterator[None]:
    """A block in which OpenVINO's errors of memory become a ResourceError."""
    try:
        yield
    except RuntimeError as error:
        if any(words in str(error) for words in ("Failed to allocate", "bad_alloc", "std::length_error")):
            raise ResourceError(TOO_LARGE) from error
        raise


_PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}


def bind(parameter: Any, stored: Stored | Changed) -> np.ndarray:
    """Replace a graph's input by a stored tensor of its shape; 16-bit numbers are widened to float32.

    Returns the numbers, which are not copied and must live as long as the graph. Raises ModelError for another shape,
    with which the graph would read beyond their end.
    """
    ov = openvino()
    shape = tuple(parameter.get_output_partial_shape(0).to_shape())
    if stored.shape != shape:
        name = parameter.get_friendly_name().removeprefix(WEIGHT)
        raise ModelError(f"{name} has the shape {stored.shape}, not the config's {shape} ({stored.file})")
    values = stored.read()
    kind = {"F64": ov.Type.f64, "F32": ov.Type.f32, "F16": ov.Type.f16, "BF16": ov.Type.bf16}[stored.kind]
    constant = ov.op.Constant(ov.Tensor(values, ov.Shape(list(shape)), kind), shared_memory=True)
    (widened,) = parameter.output(0).get_target_inputs()
    if stored.kind == "F32":
        widened.get_node().output(0).replace(constant.output(0))
    else:
        widened.replace_source_output(constant.output(0))
    return values
