"""The networks of a model written as OpenVINO graphs, by tracing torch's; see runtime/graphs.py for the files.

A graph does not depend on the weights: every weight that the tracer finds becomes an input of the same name. Networks
are converted to float32 one after another, so the largest of them decides how much memory that takes.
"""

from __future__ import annotations

import copy
import gc
import gzip
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast
from xml.etree import ElementTree

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn

from latentdiff.core.errors import ConfigError, ModelError, raised_as, saving
from latentdiff.core.files import atomic, write_json
from latentdiff.model import Model
from latentdiff.networks.controls.controlnet import ControlNet
from latentdiff.networks.traced import Traced
from latentdiff.runtime.compiling import Compiler, has_bfloat16, openvino
from latentdiff.runtime.graphs import (
    CONSTANTS,
    FOLDER,
    FORMAT,
    RECORD,
    WEIGHT,
    Exported,
    config_hash,
    exported,
    file_of,
    sealed,
    tokenizer_of,
)
from latentdiff.runtime.quantized import is_quantized

LARGEST_DIFFERENCE = 1e-3  # share of a graph's largest value; rounding is about 1e-6
NARROW_DIFFERENCE = 0.1  # the same in bfloat16, for large graphs; a size traced as a constant differs by more
LARGE = 2**31  # bytes of weights: in float32 a graph takes twelve bytes a weight to compile, in bfloat16 seven


class Check(NamedTuple):
    """The inputs of a graph and torch's outputs for them."""

    inputs: Mapping[str, np.ndarray]
    outputs: Sequence[np.ndarray]


class _Function(nn.Module):
    """A function whose arguments have an order. A tracer requires a module, which holds the weights."""

    def __init__(self, traced: Traced):
        super().__init__()
        self.network, self._function, self._names = traced.network, traced.function, list(traced.inputs[0])

    def forward(self, *arrays: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self._function(**dict(zip(self._names, arrays, strict=True)))


def export(model: Model, directory: Path, variant: str | None = None) -> dict[str, float]:
    """Write `directory`/openvino for a torch model that lies in `directory`.

    Returns each graph's error against torch's network on other shapes: the largest difference over the largest value.
    Raises ConfigError for a model with learnt words or quantized weights, ModelError if the traced graph computes
    something else.
    """
    if is_quantized(model):
        raise ConfigError("a model with quantized weights cannot be exported for OpenVINO")
    networks = _networks(model)
    with saving("the graphs", directory), atomic(directory / FOLDER) as made:
        made.mkdir()
        checks = _written(networks, _record(model, directory, made), made)
        return _differences(exported(directory, variant, made), checks)


def export_control(control: Any, directory: Path) -> dict[str, float]:
    """Write `directory`/openvino for a ControlNet that lies in `directory`; see `export`."""
    if not isinstance(control, ControlNet):
        raise ConfigError("only ControlNets can be exported; a T2I-Adapter draws with torch")
    with saving("the graphs", directory), atomic(directory / FOLDER) as made:
        made.mkdir()
        record = {"openvino": openvino().__version__, "configs": {".": config_hash(directory)}, "graphs": {}}
        checks = _written([(control, ())], {"format": FORMAT, **record, "control": control.facts()}, made)
        return _differences(exported(directory, None, made), checks)


def _written(networks: Sequence[tuple[Any, tuple[str, ...]]], record: dict[str, Any], made: Path) -> dict[str, Check]:
    """Write the graphs of networks, their constants and the record, which gets the graphs' names; returns checks."""
    constants, checks = {}, {}
    for network, part in networks:
        for graph, (part_of, numbers, check) in _graphs(network, part, made).items():
            record["graphs"][graph], constants[graph], checks[graph] = part_of, numbers, check
        gc.collect()  # the copy in float32 is in reference cycles
    save_file(constants, made / CONSTANTS)
    write_json(made / RECORD, sealed(record))
    return checks


def _networks(model: Model) -> list[tuple[Any, tuple[str, ...]]]:
    """All networks, text encoders with the names of their parts. Raises ConfigError unless all can be traced."""
    texts: Mapping[str, Any] | None = getattr(model.encoder, "texts", None)
    networks: list[tuple[Any, tuple[str, ...]]] = [(model.backbone, ()), (model.codec, ())]
    networks[1:1] = [(text, (part,)) for part, text in (texts or {}).items()]
    if texts is None or not all(hasattr(network, "traced") for network, _ in networks):
        raise ConfigError("the networks of this model have no form that OpenVINO's tracer can follow")
    return networks


def _graphs(network: Any, part: tuple[str, ...], made: Path) -> dict[str, tuple[str, np.ndarray, Check]]:
    """Write the graphs of a network; returns, for each, the part with its weights, its constants, and its check."""
    results = {}
    with _exact(network) as exact:
        functions: Mapping[str, Traced] = exact.eval().traced(*part)
        for graph, traced in functions.items():
            with raised_as(ModelError, f"cannot export {graph}"):
                numbers = _write(_traced(traced), made / file_of(graph))
            results[graph] = traced.part, numbers, _check(traced)
    return results


@contextmanager
def _exact(network: nn.Module) -> Iterator[Any]:
    """A block with a network in float32 on the CPU; afterwards it is as it was, to the bit.

    A network on the CPU is converted in place, which takes less memory than a copy.
    """
    kinds = {(weight.dtype, weight.device.type) for weight in network.parameters()}
    if not kinds or kinds == {(torch.float32, "cpu")}:
        yield network
    elif len(kinds) == 1 and (kind := next(iter(kinds)))[1] == "cpu" and kind[0] in (torch.bfloat16, torch.float16):
        network.to(dtype=torch.float32)
        try:
            yield network
        finally:
            network.to(dtype=kind[0])  # what came from 16 bits returns to the same bits
    else:
        yield copy.deepcopy(network).to("cpu", torch.float32)


def _traced(traced: Traced) -> Any:
    """OpenVINO's graph of a function with inputs in place of weights. Raises ModelError if a weight remains."""
    ov = openvino()
    from openvino._offline_transformations import apply_moc_transformations
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    module, inputs = _Function(traced).eval(), traced.inputs[0]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns about every comparison of sizes
        frontend = FrontEndManager().load_by_framework("pytorch")
        decoder = TorchScriptPythonDecoder(
            module,
            example_input=tuple(inputs.values()),
            shared_memory=True,
            trace_kwargs={"check_trace": False},  # the tracer's own check takes a third of the time; see _differences
        )
        graph = frontend.convert(frontend.load(decoder))
    for name, parameter in zip(inputs, graph.get_parameters(), strict=True):
        parameter.set_friendly_name(name)
        parameter.output(0).get_tensor().set_names({name})
    weights = []
    for constant, name in _weights_in(graph, traced.network):
        weight = ov.op.Parameter(ov.Type.f16, ov.Shape(list(constant.shape)))
        weight.set_friendly_name(f"{WEIGHT}{name}")
        widened = _widening(constant.shape)
        widened.input(0).replace_source_output(weight.output(0))
        constant.output(0).replace(widened.output(0))
        weights.append(weight)
    graph.add_parameters(weights)
    # the library's converter does this last: it halves the operations, and a large U-Net is a tenth faster
    apply_moc_transformations(graph, cf=True)
    return graph


def _widening(shape: Any) -> Any:
    """A graph that converts to float32 and keeps its input in 16 bits until then; only compression makes one."""
    ov = openvino()
    from openvino import opset15
    from openvino._offline_transformations import compress_model_transformation

    model = ov.Model([opset15.result(ov.op.Constant(np.zeros(list(shape), np.float32)))], [])
    compress_model_transformation(model)
    return model.get_results()[0].input_value(0).get_node()


def _weights_in(graph: Any, network: nn.Module) -> list[tuple[Any, str]]:
    """The graph's constants that are weights, with their names. Raises ModelError for a weight without a name."""
    known = dict(network.named_parameters(remove_duplicate=False))
    stored = network.state_dict(keep_vars=True)
    known |= {name: each for name, each in stored.items() if each.is_floating_point() and each.ndim}
    numbers = {_ends(each.detach().numpy()) for each in known.values() if each.numel() > 1}
    results = []
    for constant in [node for node in graph.get_ops() if node.get_type_name() == "Constant"]:
        name = constant.get_friendly_name().removeprefix("self.").removeprefix("network.")
        if name in known:
            results.append((constant, name))
        elif constant.get_element_type().is_real() and constant.data.size > 1 and _ends(constant.data) in numbers:
            raise ModelError(f"the tracer lost the name of a weight ({name})")
    return results


def _ends(numbers: np.ndarray) -> tuple[int, bytes]:
    """A fingerprint of an array: its length, and its first and last thousand numbers."""
    flat = numbers.reshape(-1)
    return len(flat), np.concatenate([flat[:1000], flat[-1000:]]).tobytes()


def _write(graph: Any, file: Path) -> np.ndarray:
    """Write a graph, compressed to a twelfth; returns its constants as bytes, (N,) uint8."""
    plain, constants = file.with_suffix(""), file.with_suffix(".constants")
    openvino().serialize(graph, str(plain), str(constants))
    tree = ElementTree.parse(plain)
    _keep_angles_exact(tree)
    _drop_names_of_origin(tree)
    file.write_bytes(gzip.compress(ElementTree.tostring(tree.getroot()), mtime=0))  # equal graphs, equal files
    content = np.frombuffer(constants.read_bytes(), np.uint8)
    plain.unlink()
    constants.unlink()
    return content


def _keep_angles_exact(tree: ElementTree.ElementTree[ElementTree.Element]) -> None:
    """Mark everything that a sine or cosine is computed from, so that it stays float32 in bfloat16 too.

    Times and places are angles of hundreds of radians there, of which bfloat16 keeps whole numbers up to 256:
    without the mark a transformer's output is wrong by a tenth. The library keeps what is marked (OpenVINO 2026.4).
    """
    layers = {layer.get("id"): layer for layer in tree.iterfind("layers/layer")}
    sources: dict[str | None, list[str | None]] = {}
    for edge in tree.iterfind("edges/edge"):
        sources.setdefault(edge.get("to-layer"), []).append(edge.get("from-layer"))
    ahead, seen = [key for key, layer in layers.items() if layer.get("type") in ("Sin", "Cos")], set()
    while ahead:
        key = ahead.pop()
        if key not in seen:
            seen.add(key)
            ahead += sources.get(key, [])
    for key in seen:
        layer = layers[key]
        facts = layer.find("rt_info")
        if facts is None:
            facts = ElementTree.Element("rt_info")
            layer.insert(0 if layer.find("data") is None else 1, facts)
        ElementTree.SubElement(facts, "attribute", {"name": "precise", "version": "0"})


def _drop_names_of_origin(tree: ElementTree.ElementTree[ElementTree.Element]) -> None:
    """Remove which of torch's operations each one comes from, and white space: two fifths of a file."""
    for layer in tree.iterfind("layers/layer"):
        for facts in layer.findall("rt_info"):
            for attribute in facts.findall("attribute[@name='fused_names']"):
                facts.remove(attribute)
            if not len(facts):
                layer.remove(facts)
    for element in tree.iter():
        element.text, element.tail = (text and (text.strip() or None) for text in (element.text, element.tail))


def _check(traced: Traced) -> Check:
    inputs = traced.inputs[1]
    with torch.no_grad():
        outputs = (traced.reference or traced.function)(**inputs)
    each = outputs if isinstance(outputs, tuple) else (outputs,)
    return Check({name: array.numpy() for name, array in inputs.items()}, [array.numpy() for array in each])


def _record(model: Model, directory: Path, made: Path) -> dict[str, Any]:
    """The content of export.json: what runtime/openvino.py must know about the networks. No graph is named yet."""
    backbone, encoder, codec = (cast("Any", network) for network in (model.backbone, model.encoder, model.codec))
    weights = [name for name in model.parts if (directory / name / "config.json").is_file()]
    return {
        "format": FORMAT,
        "openvino": openvino().__version__,
        "configs": {part: config_hash(directory / part) for part in weights},
        "graphs": {},
        "backbone": backbone.facts(),
        "codec": codec.facts(),
        "encoder": {"kind": encoder.kind, "options": encoder.options()},
        "texts": {part: _words(text, part, directory, made) for part, text in encoder.texts.items()},
    }


def _words(encoder: Any, part: str, directory: Path, made: Path) -> dict[str, Any]:
    """The record of a text encoder. Its tokenizer's file is written unless the model has the same one."""
    if learnt := getattr(encoder, "learnt_words", None):
        raise ConfigError(f"a model with learnt words cannot be exported ({', '.join(learnt)})")
    words, name = encoder.tokenizer_json(), tokenizer_of(part)
    own = directory / name / "tokenizer.json"
    same = own.is_file() and _vocabulary(own.read_text(encoding="utf-8")) == _vocabulary(words)
    if not same:
        (made / name).mkdir()
        (made / name / "tokenizer.json").write_text(words, encoding="utf-8")
    return {"tokenizer": "model" if same else "export", "words": len(encoder.model.get_input_embeddings().weight)} | (
        encoder.facts()
    )


def _vocabulary(words: str) -> dict[str, Any]:
    """A tokenizer's file without its settings for cutting and padding, which callers choose."""
    return json.loads(words) | {"truncation": None, "padding": None}


def _differences(exported_model: Exported | None, checks: Mapping[str, Check]) -> dict[str, float]:
    """The error of each graph, read from disk, against torch's outputs."""
    assert exported_model is not None
    results = {}
    for graph, check in checks.items():
        size = sum(stored.end - stored.begin for stored in exported_model.weights(graph).values())
        narrow = size >= LARGE and has_bfloat16()
        compiler = Compiler(exported_model, "bfloat16" if narrow else "float32")
        pairs = zip(compiler.run(graph, check.inputs), check.outputs, strict=True)
        results[graph] = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)
        if not results[graph] <= (NARROW_DIFFERENCE if narrow else LARGEST_DIFFERENCE):
            apart = f"{graph} differs by {results[graph]:.1e} of its largest value"
            raise ModelError(f"cannot export: {apart} ({exported_model.directory})")
    return results
