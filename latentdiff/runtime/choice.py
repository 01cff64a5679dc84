"""Which runtime a model is drawn with: torch, or OpenVINO on a CPU where the model has been exported for it.

auto        OpenVINO where there is an export that fits, no GPU, and nothing asked for that it lacks; else torch
torch       every device and precision, and all that can be loaded beside a model
openvino    float32, or bfloat16 where the CPU computes in it: the default there, unless speed is "exact"
"""

from __future__ import annotations

import ctypes
import sys
import warnings
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from latentdiff.core.errors import ConfigError, ModelError
from latentdiff.families.pretrained import Located, card_of, load_pipeline, located
from latentdiff.families.scheduler import read_scheduler
from latentdiff.formats.folder import check_folder
from latentdiff.pipeline import Compiled, LatentDiffusionPipeline

if TYPE_CHECKING:
    import torch

    from latentdiff.pipeline import Networks
    from latentdiff.runtime.graphs import Exported
    from latentdiff.runtime.speed import Speed

SPEEDS = ("exact", "fast", "max")
RUNTIMES = ("auto", "torch", "openvino")
_DRIVERS = (  # of GPUs that torch would take: the library, what readies it, what counts devices
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
) -> LatentDiffusionPipeline:
    """See LatentDiffusionPipeline.from_pretrained."""
    if runtime not in RUNTIMES:
        raise ConfigError(f"unknown runtime {str(runtime)[:40]!r}; one of {', '.join(RUNTIMES)}")
    if speed not in (None, *SPEEDS):
        raise ConfigError(f"unknown speed {str(speed)[:40]!r}; one of {', '.join(SPEEDS)}")
    precision = None if dtype is None else str(dtype).removeprefix("torch.")
    if precision is None and speed == "exact":
        precision = "float32"
    wanted = runtime == "openvino"
    if wanted and (lacks := _lacks(device or "cpu", precision)):
        raise ConfigError(f"the openvino runtime {lacks}")
    if wanted or (runtime == "auto" and not _lacks(device, precision)):
        source = located(path, variant, revision)
        if (export := _export(source, variant, wanted=wanted)) is not None:
            return _compiled(source, export, precision, variant, cast("Speed | None", speed), wanted=wanted)
    return _by_torch(path, device, dtype, speed, variant, revision)


def _by_torch(
    path: str | Path | None, device: Any, dtype: Any, speed: str | None, variant: str | None, revision: str | None
) -> LatentDiffusionPipeline:
    from latentdiff.runtime.speed import narrow_dtype

    dtype = _torch_dtype(dtype)
    pipe = load_pipeline(path, device=device, dtype=dtype, variant=variant, revision=revision)
    pipe.speed = cast("Speed", speed or "exact")
    return pipe.to(dtype=narrow_dtype(pipe.device)) if speed == "max" and dtype is None else pipe


def _lacks(device: object, precision: str | None) -> str | None:
    """Why what is asked for cannot be drawn by OpenVINO here; None where it can."""
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
    """As torch would find it, without the seconds that its import takes: by asking the drivers."""
    for library, ready, count in _DRIVERS:
        try:
            driver, number = ctypes.CDLL(library), ctypes.c_int(0)
            if getattr(driver, ready)(0) == 0 and getattr(driver, count)(ctypes.byref(number)) == 0 and number.value:
                return True
        except (OSError, AttributeError):
            continue
    return False


def _export(source: Located, variant: str | None, *, wanted: bool) -> Exported | None:
    """The export of a model, None where there is none. Where it is `wanted`, raises ModelError instead."""
    from latentdiff.runtime.graphs import FOLDER, exported

    if source.path.is_dir() and (source.path / FOLDER).is_dir():
        check_folder(source.path)
        try:
            return exported(source.path, variant)
        except ModelError as error:
            if wanted:
                raise
            warnings.warn(f"drawing with torch: {error}", stacklevel=2)
            return None
    if wanted:
        raise ModelError(f"no export in {source.path}. Make one: latentdiff convert {source.path} --to openvino")
    return None


def _compiled(
    source: Located, export: Exported, precision: str | None, variant: str | None, speed: Speed | None, *, wanted: bool
) -> LatentDiffusionPipeline:
    """A pipeline on an export's networks; unless it is `wanted`, it may take torch's when asked for more.

    torch's are of the precision and the speed that were asked for, as if they had been taken at once.
    """
    from latentdiff.runtime.compiling import Compiler, has_bfloat16
    from latentdiff.runtime.openvino import begin, networks_of

    schedule, prediction, _ = read_scheduler(source.path)
    card = card_of(source, schedule, variant)
    compiler = Compiler(export, precision or ("bfloat16" if has_bfloat16() else "float32"), card.hash)

    def torch_networks() -> Networks:
        pipe = _by_torch(source.path, "cpu", precision, speed, variant, None)
        return pipe.autoencoder, pipe.text_encoder, pipe.unet

    # typed as torch's, they answer to what drawing asks of those
    networks = networks_of(export, compiler)
    compiled = Compiled(partial(begin, *networks), None if wanted else torch_networks, speed or "exact")
    return LatentDiffusionPipeline(*cast("Networks", networks), schedule, prediction, card, compiled=compiled)


def _torch_dtype(dtype: torch.dtype | str | None) -> Any:
    if not isinstance(dtype, str):
        return dtype
    import torch

    return getattr(torch, dtype, dtype)
