"""The networks of a model written as OpenVINO graphs, by tracing torch's; see runtime/graphs.py for the files.

A graph does not depend on the weights: every weight that the tracer finds becomes an input of the same name.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn

from latentdiff.core.errors import ConfigError, ModelError, raised_as, saving
from latentdiff.core.files import whole, write_json
from latentdiff.diffusion.noise import normal
from latentdiff.model import Model
from latentdiff.networks.backbones.unet import UNet
from latentdiff.networks.codecs.autoencoder import Autoencoder
from latentdiff.networks.conditions import Conditions
from latentdiff.networks.encoders.clip import TextEncoder
from latentdiff.networks.encoders.two_clips import TwoTextEncoders
from latentdiff.runtime.compiling import Compiler, openvino
from latentdiff.runtime.device import moved
from latentdiff.runtime.graphs import (
    CONSTANTS,
    FOLDER,
    FORMAT,
    RECORD,
    TOKENIZER,
    WEIGHT,
    Exported,
    config_hash,
    exported,
)
from latentdiff.runtime.quantized import is_quantized

LARGEST_DIFFERENCE = 1e-3  # share of a graph's largest value; rounding is about 1e-6


class _Texts(nn.Module):
    """Token ids (n, L) -> the hidden states for each clip_skip, then the pooled text if there is one."""

    def __init__(self, encoder: TextEncoder):
        super().__init__()
        self.network, self._encoder = encoder.model, [encoder]  # a list: no second module

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        (encoder,) = self._encoder
        output = encoder.outputs(ids)
        hidden = tuple(encoder.hidden(output, skipped) for skipped in range(encoder.layers))
        return hidden if output.get("text_embeds") is None else (*hidden, output["text_embeds"])


class _Denoised(nn.Module):
    """(x, t, the U-Net's conditions in order) -> output."""

    def __init__(self, unet: UNet):
        super().__init__()
        self.network, self._unet = unet.model, [unet]

    def _output(self, x: Tensor, t: Tensor, *arrays: Tensor) -> Tensor:
        (unet,) = self._unet
        output: Tensor = unet(x, t, Conditions(dict(zip(unet.spec.reads, arrays, strict=True))))
        return output

    def forward(self, x: Tensor, t: Tensor, *arrays: Tensor) -> Tensor:
        return self._output(x, t, *arrays)


class _Deep(_Denoised):
    """(x, t, tokens, ...) -> output and deep features; see UNet.predict_from."""

    def forward(self, x: Tensor, t: Tensor, *arrays: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        with self._unet[0].deep(None) as features:
            output = self._output(x, t, *arrays)
        return output, features[0]


class _Shallow(_Denoised):
    """(x, t, deep features, tokens, ...) -> output."""

    def forward(self, x: Tensor, t: Tensor, *arrays: Tensor) -> Tensor:
        with self._unet[0].deep(arrays[0]):
            return self._output(x, t, *arrays[1:])


class _Coded(nn.Module):
    """Latents -> images, or images -> the posterior's mean."""

    def __init__(self, autoencoder: Autoencoder, code: Callable[[Tensor], Tensor]):
        super().__init__()
        self.network, self._code = autoencoder.vae, [code]

    def forward(self, x: Tensor) -> Tensor:
        return self._code[0](x)


def export(model: Model, directory: Path, variant: str | None = None) -> dict[str, float]:
    """Write `directory`/openvino for a torch model that lies in `directory`.

    Returns each graph's error against torch's network on other shapes: the largest difference over the largest value.
    Raises ConfigError for a model with learnt words or with networks other than Stable Diffusion's, ModelError if the
    traced graph computes something else.
    """
    unet, encoder = model.backbone, model.encoder
    if not (isinstance(unet, UNet) and isinstance(encoder, TextEncoder | TwoTextEncoders)):
        raise ConfigError("only models with a U-Net and CLIP's text encoders can be exported to OpenVINO")
    if is_quantized(model):
        raise ConfigError("the graphs for OpenVINO read numbers, and this model's weights are quantized")
    model = moved(model, "cpu", torch.float32)
    parts = _parts(model, unet, encoder)
    with raised_as(ModelError, "cannot export"):
        graphs = {part: _traced(module, inputs) for part, (module, inputs) in parts.items()}
    with saving("the graphs", directory), whole(directory / FOLDER) as made:
        made.mkdir()
        constants = {part: _write(graph, made / f"{part}.xml") for part, graph in graphs.items()}
        save_file(constants, made / CONSTANTS)
        write_json(made / RECORD, _record(model, directory, made))
        return _differences(exported(directory, variant, made), parts)


def _parts(model: Model, unet: UNet, texts: TextEncoder | TwoTextEncoders) -> dict[str, tuple[nn.Module, list[Tensor]]]:
    """The module of each graph, and inputs whose sizes are all different, so that the tracer confuses none."""
    autoencoder, spec = model.codec, unet.spec
    parts: dict[str, tuple[nn.Module, list[Tensor]]] = {}
    for name, encoder in zip(("text_encoder", "text_encoder_2"), texts.encoders, strict=False):
        ids = torch.arange(encoder.length).expand(2, -1) % encoder.reader.end
        parts[name] = _Texts(encoder), [ids]
    side = 2**unet.deep_levels  # odd sides: each level is enlarged to the size of its skip connections, whatever it is
    latents = _normal(3, spec.inputs, 2 * side + 1, 3 * side + 1)
    lengths = {"tokens": (texts.length, spec.reads["tokens"][1])}
    arrays = [_normal(3, *(int(side or 0) for side in lengths.get(name, shape))) for name, shape in spec.reads.items()]
    if model.reads_sizes:
        arrays[-1] = torch.arange(18.0).reshape(3, 6) * 64
    inputs = [latents, torch.tensor([501.0]), *arrays]
    parts["unet"] = _Denoised(unet), inputs
    if unet.deep_levels:
        parts["unet_deep"] = _Deep(unet), inputs
        with torch.no_grad():
            _, deep = _Deep(unet)(*inputs)
        parts["unet_shallow"] = _Shallow(unet), [*inputs[:2], deep, *arrays]
    if isinstance(autoencoder, Autoencoder):
        pixels = _normal(3, autoencoder.image_channels, *(side * autoencoder.factor for side in latents.shape[2:]))
        parts["vae_decoder"] = _Coded(autoencoder, autoencoder.decode), [latents[:, : autoencoder.latent_channels]]
        parts["vae_encoder"] = _Coded(autoencoder, lambda images: autoencoder.encode(images)[0]), [pixels]
    return parts


def _normal(*shape: int) -> Tensor:
    return torch.from_numpy(normal(shape, 0, "export"))


def _traced(module: nn.Module, inputs: list[Tensor]) -> Any:
    """OpenVINO's graph of a module with inputs in place of weights. Raises ModelError if a weight remains."""
    ov = openvino()
    from openvino._offline_transformations import apply_moc_transformations
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns about every comparison of sizes
        frontend = FrontEndManager().load_by_framework("pytorch")
        decoder = TorchScriptPythonDecoder(module.eval(), example_input=tuple(inputs), shared_memory=True)
        graph = frontend.convert(frontend.load(decoder))
    weights = []
    for constant, name in _weights_in(graph, module):
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


def _weights_in(graph: Any, module: nn.Module) -> list[tuple[Any, str]]:
    """The graph's constants that are weights, with their names. Raises ModelError for a weight without a name."""
    known = dict(module.named_parameters(remove_duplicate=False))
    numbers = {parameter.detach().numpy().tobytes() for parameter in known.values()}
    results = []
    for constant in [node for node in graph.get_ops() if node.get_type_name() == "Constant"]:
        name = constant.get_friendly_name().removeprefix("self.")
        if name in known:
            results.append((constant, name.removeprefix("network.")))
        elif constant.get_element_type().is_real() and constant.data.size > 1 and constant.data.tobytes() in numbers:
            raise ModelError(f"cannot export: the tracer lost the name of a weight ({name})")
    return results


def _write(graph: Any, file: Path) -> np.ndarray:
    """Write a graph; returns its constants as bytes, (N,) uint8."""
    constants = file.with_suffix(".constants")
    openvino().serialize(graph, str(file), str(constants))
    content = np.frombuffer(constants.read_bytes(), np.uint8)
    constants.unlink()
    return content


def _record(model: Model, directory: Path, made: Path) -> dict[str, Any]:
    """The content of export.json: what runtime/openvino.py must know about the networks."""
    autoencoder, unet, texts = model.codec, model.backbone, model.encoder
    assert isinstance(unet, UNet)
    assert isinstance(texts, TextEncoder | TwoTextEncoders)
    encoders = dict(zip(("text_encoder", "text_encoder_2"), texts.encoders, strict=False))
    parts = ["unet", *encoders, *(["vae"] if isinstance(autoencoder, Autoencoder) else [])]
    return {
        "format": FORMAT,
        "openvino": openvino().__version__,
        "configs": {part: config_hash(directory / part) for part in parts},
        "unet": {
            "inputs": unet.spec.inputs,
            "outputs": unet.spec.outputs,
            "reads": {name: list(shape) for name, shape in unet.spec.reads.items()},
            "deep_levels": unet.deep_levels,
        },
        "vae": {
            "factor": autoencoder.factor,
            "latent_channels": autoencoder.latent_channels,
            "image_channels": autoencoder.image_channels,
        },
        **{part: _words(encoder, part, directory, made) for part, encoder in encoders.items()},
        "zero_empty": isinstance(texts, TwoTextEncoders) and texts.zero_empty,
    }


def _words(encoder: TextEncoder, part: str, directory: Path, made: Path) -> dict[str, Any]:
    """The record of a text encoder. Its tokenizer's file is written unless the model has the same one."""
    if encoder.learnt_words:
        raise ConfigError(f"a model with learnt words cannot be exported ({', '.join(encoder.learnt_words)})")
    reader, words, name = encoder.reader, encoder.tokenizer_json(), TOKENIZER[part]
    own = directory / name / "tokenizer.json"
    same = own.is_file() and _vocabulary(own.read_text(encoding="utf-8")) == _vocabulary(words)
    if not same:
        (made / name).mkdir()
        (made / name / "tokenizer.json").write_text(words, encoding="utf-8")
    record = {"layers": encoder.layers, "length": reader.length, "tokenizer": "model" if same else "export"}
    return record | {"start": reader.start, "end": reader.end, "pad": reader.pad}


def _vocabulary(words: str) -> dict[str, Any]:
    """A tokenizer's file without its settings for cutting and padding, which callers choose."""
    return json.loads(words) | {"truncation": None, "padding": None}


def _differences(exported_model: Exported | None, parts: dict[str, tuple[nn.Module, list[Tensor]]]) -> dict[str, float]:
    """The error of each graph against its module. Graphs are read from disk and compute one row."""
    assert exported_model is not None
    compiler, results = Compiler(exported_model, "float32"), {}
    for part, (module, inputs) in parts.items():
        rows = [tensor if tensor.ndim == 1 else tensor[:1] for tensor in inputs]  # the time is one number for all rows
        with torch.no_grad():
            theirs = module(*rows)
        theirs = theirs if isinstance(theirs, tuple) else (theirs,)
        pairs = zip(compiler.run(part, *(row.numpy() for row in rows)), theirs, strict=True)
        results[part] = max(float(np.abs(a - b.numpy()).max() / b.abs().max()) for a, b in pairs)
        if not results[part] <= LARGEST_DIFFERENCE:
            apart = f"{part} differs by {results[part]:.1e} of its largest value"
            raise ModelError(f"cannot export: {apart} ({exported_model.directory})")
    return results
