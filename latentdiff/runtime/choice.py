"""The choice of runtime: torch, or OpenVINO on a CPU for a model that has an export.

auto        OpenVINO if the model has an export, there is no GPU and the request needs nothing else; otherwise torch
torch       every device and precision, and everything that can be loaded beside a model
openvino    float32, or bfloat16 if the CPU computes in it: then that is the default, unless speed is "exact"
"""

from __future__ import annotations

import ctypes
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from latentdiff.core.errors import ConfigError, ModelError
from latentdiff.families import check_folder
from latentdiff.families.loading import Located, card_of, located
from latentdiff.families.scheduler import read_scheduler
from latentdiff.formats.folder import GGUF, NETWORKS
from latentdiff.model import Model, ModelCard, NumPyPlace, Speed
from latentdiff.runtime import kinds

if TYPE_CHECKING:
    import torch

    from latentdiff.runtime.graphs import Exported

SPEEDS = ("exact", "fast", "max")
RUNTIMES = ("auto", "torch", "openvino")
_DRIVERS = (  # GPU drivers that torch uses: the library, its initialisation, its count of devices
    ("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1", "cuInit", "cuDeviceGetCount"),
    ("libamdhip64.so", "hipInit", "hipGetDeviceCount"),
)


def load(
    path: str | Path | None = None,
    *,
    runtime: str = "auto",
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    speed: str | None = None,
    quantize: str | None = None,
) -> tuple[Model, Speed]:
    """A model and its speed by torch; see LatentDiffusionPipeline.from_pretrained."""
    if runtime not in RUNTIMES:
        raise ConfigError(f"unknown runtime {str(runtime)[:40]!r}; one of {', '.join(RUNTIMES)}")
    if speed not in (None, *SPEEDS):
        raise ConfigError(f"unknown speed {str(speed)[:40]!r}; one of {', '.join(SPEEDS)}")
    kinds.check_kind(quantize, runtime)
    chosen = cast("Speed", speed or "exact")
    precision = None if dtype is None else str(dtype).removeprefix("torch.")
    if precision is None and speed == "exact":
        precision = "float32"
    required = runtime == "openvino"
    compiled = required or (runtime == "auto" and quantize in (None, *kinds.OPENVINO))
    if required and (lacks := _lacks(device or "cpu", precision)):
        raise ConfigError(f"the openvino runtime {lacks}")
    if compiled and (required or not _lacks(device, precision)):
        source = located(path, variant, revision)
        if (export := _export(source, variant, required=required)) is not None:
            return _noted(_compiled(source, export, precision, variant, chosen, quantize, required=required)), chosen
    if quantize in kinds.OPENVINO_ONLY:
        raise ConfigError(
            f"{quantize} requires OpenVINO on a CPU and graphs of the model: latentdiff convert MODEL --to openvino"
        )
    return _noted(_by_torch(path, device, dtype, chosen, variant, revision, quantize)), chosen


def _noted(model: Model) -> Model:
    """The model, after a warning about settings of its scheduler that are not supported here."""
    if model.card.notes:
        what = ", ".join(model.card.notes)
        warnings.warn(
            f"the model's scheduler has {what}, which this package does not support: pictures differ from diffusers'",
            stacklevel=4,
        )
    return model


def _by_torch(
    path: str | Path | None,
    device: Any,
    dtype: Any,
    speed: Speed,
    variant: str | None,
    revision: str | None,
    quantize: str | None = None,
) -> Model:
    import torch

    from latentdiff.families.loading import stored_model
    from latentdiff.runtime.device import check_dtype, moved, usable_device
    from latentdiff.runtime.speed import narrow_dtype

    where, chosen = usable_device(device), _torch_dtype(dtype)
    check_dtype(chosen)
    if chosen is None:
        chosen = narrow_dtype(where) if speed == "max" else torch.float32
    model = moved(stored_model(path, variant, revision), where, chosen)
    if quantize is None:
        return model
    from latentdiff.runtime.quantized import quantized

    return quantized(model, quantize)


def _lacks(device: object, precision: str | None) -> str | None:
    """Why OpenVINO cannot draw with this device and precision; None if it can."""
    if find_spec("openvino") is None:
        return "is not installed"
    if device is None and gpu_is_there():
        return "is for the CPU, and there is a GPU"
    if device is not None and str(device) != "cpu":
        return f"is for the CPU, not for {device}"
    if precision not in (None, "float32", "bfloat16"):
        return f"computes in float32 or bfloat16, not in {precision}"
    if precision == "bfloat16":
        from latentdiff.runtime.compiling import has_bfloat16

        return None if has_bfloat16() else "computes in float32 here: the CPU has no bfloat16"
    return None


def gpu_is_there() -> bool:
    """Whether torch would find a GPU, from the drivers: torch itself takes seconds to import."""
    for library, ready, count in _DRIVERS:
        try:
            driver, number = ctypes.CDLL(library), ctypes.c_int(0)
            if getattr(driver, ready)(0) == 0 and getattr(driver, count)(ctypes.byref(number)) == 0 and number.value:
                return True
        except (OSError, AttributeError):
            continue
    return False


def _export(source: Located, variant: str | None, *, required: bool) -> Exported | None:
    """The export of a model, or None. If it is `required`, its absence raises ModelError."""
    from latentdiff.runtime.graphs import FOLDER, exported

    if required and not source.path.is_file():
        check_folder(source.path)
    if source.path.is_dir() and (source.path / FOLDER).is_dir():
        check_folder(source.path)
        try:
            return exported(source.path, variant)
        except ModelError as error:
            if required:
                raise
            warnings.warn(f"drawing with torch: {error}", stacklevel=2)
            return None
    if required and any((source.path / part / GGUF).is_file() for part in NETWORKS):
        raise ModelError(f"openvino cannot read the quantized weights in {source.path}. Draw with torch")
    if required:
        raise ModelError(f"no export in {source.path}. Make one: latentdiff convert {source.path} --to openvino")
    return None


def _compiled(
    source: Located,
    export: Exported,
    precision: str | None,
    variant: str | None,
    speed: Speed,
    quantize: str | None,
    *,
    required: bool,
) -> Model:
    """A model with an export's networks. Unless OpenVINO is `required`, torch may replace it later.

    torch's networks then have the precision and the speed of the request, as if they had been chosen at once.
    """
    from latentdiff.runtime.compiling import Compiler, has_bfloat16
    from latentdiff.runtime.openvino import begin, compiled_networks

    family, _ = check_folder(source.path)
    path, prediction, *_ = read_scheduler(source.path)
    card = card_of(source, family, path.T, variant)
    precise = precision or ("bfloat16" if has_bfloat16() else "float32")
    compiler = Compiler(export, precise, card.hash, quantize)
    networks = compiled_networks(export, compiler)
    ready = partial(begin, networks)
    alone = quantize not in (None, *kinds.TORCH)
    other = None if alone else partial(_by_torch, source.path, "cpu", precision, speed, variant, None, quantize)
    return Model(
        networks.backbone,
        networks.encoder,
        networks.codec,
        family.path(path),
        prediction,
        card,
        NumPyPlace(),
        family,
        torch_form=_named(other, card),
        runtime_is_fixed=required,
        ready=ready,
        speed="exact" if precise == "float32" else "max",
        quantized=quantize,
        enlarging=family.enlarging(source.path),
    )


def _named(other: Callable[[], Model] | None, card: ModelCard) -> Callable[[], Model] | None:
    """`other`, whose model gets this card, which has the user's name of the model; None without it."""
    return None if other is None else lambda: replace(other(), card=card)


def _torch_dtype(dtype: torch.dtype | str | None) -> Any:
    if not isinstance(dtype, str):
        return dtype
    import torch

    return getattr(torch, dtype, dtype)
