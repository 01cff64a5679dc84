"""A compiled model whose weights adapters have changed: its graphs read the changed ones in place of a file's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from latentdiff.model import Model
from latentdiff.runtime.compiling import Tensors
from latentdiff.runtime.graphs import Changed
from latentdiff.runtime.openvino import begin, compiled_networks


def with_weights(model: Model, tensors: Callable[[], Tensors], key: str, made: Callable[[], Model]) -> Model:
    """A compiled model with other tensors. They are computed when a graph is compiled that is not in the cache yet.

    key: names them in the cache. made: the same model by torch, for when that takes over.
    """
    backbone: Any = model.backbone
    compiler = backbone.compiler.changed(tensors, key)
    networks = compiled_networks(compiler.model, compiler)
    return replace(
        model,
        backbone=networks.backbone,
        encoder=networks.encoder,
        codec=networks.codec,
        ready=partial(begin, networks),
        torch_form=made,
    )


def hash_of(tensors: Tensors) -> str:
    """A hash of the numbers: they depend on more than an adapter's file, on its config and on the model's precision."""
    digest = hashlib.sha256()
    for part in sorted(tensors):
        for name, tensor in sorted(tensors[part].items()):
            digest.update(f"{part} {name} {tensor.shape}".encode())
            digest.update(np.ascontiguousarray(tensor.values).data)
    return digest.hexdigest()


def weights_of(model: Model, layers: Iterable[tuple[str, str]], file: Path) -> Tensors:
    """The weights of some layers, (part, module), of a torch model, float32. file: what has changed them."""
    tensors: dict[str, dict[str, Changed]] = {}
    for part, module in layers:
        for name, weight in model.parts[part].get_submodule(module).named_parameters(recurse=False):
            tensors.setdefault(part, {})[f"{module}.{name}"] = Changed(weight.detach().float().cpu().numpy(), file)
    return tensors
