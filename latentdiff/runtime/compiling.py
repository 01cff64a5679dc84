"""Graphs compiled for fixed shapes on this CPU, and kept in the user's cache directory for the next start.

A kept one is called by a hash of all that it was made from: graph, weights, shapes, precision, OpenVINO and processor.
It begins with the sha256 of what follows; what is damaged is made anew. The least used are removed over LIMIT.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from latentdiff.runtime.graphs import WEIGHT, Exported, Stored, named

LIMIT = 20 * 2**30  # bytes of all that is kept
Shapes = tuple[tuple[int, ...], ...]  # of a graph's inputs but its weights, in their order


def openvino() -> Any:
    """The library, without its tools: they take longer to import than all the rest, and report each import home."""
    if "openvino" not in sys.modules:
        tools = "openvino.tools.ovc"
        sys.modules[tools] = None  # type: ignore[assignment]  # which the library takes for not installed
        try:
            import openvino
        finally:
            del sys.modules[tools]
    import openvino

    return openvino


def has_bfloat16() -> bool:
    """Whether the CPU computes in bfloat16 by itself."""
    return "BF16" in openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class Compiler:
    """The graphs of one model in one precision, each compiled once for each set of shapes, in a thread of its own."""

    def __init__(self, model: Exported, precision: str, model_hash: str | None = None):
        """model_hash: of the weights; without it nothing is kept."""
        self._model, self._model_hash, self.precision = model, model_hash, precision
        self._core = openvino().Core()
        self._made: dict[tuple[str, Shapes], Future[Any]] = {}
        self._held: list[np.ndarray] = []  # what OpenVINO computes with and does not own
        self._worker = ThreadPoolExecutor(1, "compile")

    def begin(self, part: str, shapes: Shapes) -> Future[Any]:
        """Begin to compile what will be needed, unless that is begun already."""
        if (part, shapes) not in self._made:
            self._made[part, shapes] = self._worker.submit(self._compiled, part, shapes)
        return self._made[part, shapes]

    def run(self, part: str, *inputs: np.ndarray) -> list[np.ndarray]:
        """All outputs of a graph, compiled for the shapes of these inputs."""
        request = self.begin(part, tuple(array.shape for array in inputs)).result()
        for index, array in enumerate(inputs):
            request.set_input_tensor(index, openvino().Tensor(np.ascontiguousarray(array), shared_memory=True))
        request.infer()
        return [tensor.data.copy() for tensor in request.output_tensors]

    def _compiled(self, part: str, shapes: Shapes) -> Any:
        """A request that computes; kept or compiled."""
        settings = _SETTINGS | {"INFERENCE_PRECISION_HINT": _PRECISIONS[self.precision]}
        file = _folder() / f"{self._key(part, shapes)}.blob"
        if self._model_hash and (blob := _kept(file)) is not None:
            self._held.append(blob)
            return self._core.import_model(openvino().Tensor(blob), "CPU", settings).create_infer_request()
        compiled = self._core.compile_model(self._bound(part, shapes), "CPU", settings)
        if self._model_hash:
            _keep(file, compiled.export_model().getvalue())
        return compiled.create_infer_request()

    def _bound(self, part: str, shapes: Shapes) -> Any:
        """A part's graph with its weights and shapes in place."""
        graph, constants = self._model.graph(part)
        self._held.append(constants)
        model = self._core.read_model(graph, openvino().Tensor(constants))
        inputs = [p for p in model.get_parameters() if not p.get_friendly_name().startswith(WEIGHT)]
        weights = self._model.weights(network_of(part))
        for parameter in model.get_parameters():
            name = parameter.get_friendly_name()
            if name.startswith(WEIGHT):
                self._held.append(bind(parameter, named(weights, name.removeprefix(WEIGHT))))
                model.remove_parameter(parameter)
        model.reshape({parameter.output(0): list(shape) for parameter, shape in zip(inputs, shapes, strict=True)})
        return model

    def _key(self, part: str, shapes: Shapes) -> str:
        ov = openvino()
        cpu = [self._core.get_property("CPU", name) for name in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")]
        made_from = [self._model.identity(part), self._model_hash, shapes, self.precision, ov.__version__, cpu]
        return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()


# Snippets, kernels generated for groups of operations, make a step no faster here and double the time to the first one;
# in float32 their search for patterns ends the process in some U-Nets (OpenVINO 2026.4).
_SETTINGS = {"PERFORMANCE_HINT": "LATENCY", "SNIPPETS_MODE": "DISABLE"}
_PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}


def network_of(part: str) -> str:
    """The network whose weights a graph computes with."""
    return "vae" if part.startswith("vae") else part


def bind(parameter: Any, stored: Stored) -> np.ndarray:
    """Put a stored tensor in the place of a graph's input of that many numbers, which computes in float32.

    Returns the numbers, which are not copied: they must live as long as the graph.
    """
    ov = openvino()
    from openvino import opset15

    values, shape = stored.read(), list(parameter.get_output_partial_shape(0).to_shape())
    kind = {"F64": ov.Type.f64, "F32": ov.Type.f32, "F16": ov.Type.f16, "BF16": ov.Type.bf16}[stored.kind]
    constant = ov.op.Constant(ov.Tensor(values, ov.Shape(shape), kind), shared_memory=True)
    parameter.output(0).replace((constant if stored.kind == "F32" else opset15.convert(constant, "f32")).output(0))
    return values


def _folder() -> Path:
    """Where compiled graphs are kept, by the system's custom."""
    own = os.environ.get("LATENTDIFF_CACHE")
    if own:
        return Path(own)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", "~")).expanduser() / "latentdiff" / "cache"
    if sys.platform == "darwin":
        return Path("~/Library/Caches/latentdiff").expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "latentdiff"


def _kept(file: Path) -> np.ndarray | None:
    """A kept blob that is whole, or None."""
    try:
        content = np.memmap(file, np.uint8, "r")
    except (OSError, ValueError):
        return None
    blob = content[32:]
    if hashlib.sha256(blob.data).digest() != content[:32].tobytes():
        return None
    os.utime(file)
    return blob


def _keep(file: Path, blob: bytes) -> None:
    """Write a blob, whole or not at all; where nothing can be written the next start compiles again."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=".", delete=False) as scratch:
            try:
                scratch.write(hashlib.sha256(blob).digest())
                scratch.write(blob)
                scratch.close()
                Path(scratch.name).replace(file)
            except BaseException:
                Path(scratch.name).unlink()
                raise
        _prune(sorted(file.parent.glob("*.blob"), key=lambda path: path.stat().st_mtime, reverse=True))
    except OSError:
        return


def _prune(newest_first: Sequence[Path]) -> None:
    total = 0
    for path in newest_first:
        total += path.stat().st_size
        if total > LIMIT:
            path.unlink()
