"""diffusers' scheduler configs: the path that a folder describes, and the config that describes a path."""

from __future__ import annotations

import math
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from latentdiff.core.errors import ConfigError, ModelError, raised_as
from latentdiff.core.text import one_line
from latentdiff.diffusion.path import ByTokens, Path, Straight, VariancePreserving
from latentdiff.families.sampling import FLOW, Sampling, sampling_of, scheduler_of
from latentdiff.model import Model
from latentdiff.settings.validation import first_fault

FILE = "scheduler/scheduler_config.json"
_KINDS = ("linear", "scaled_linear", "squaredcos_cap_v2")
_DISTILLED = {  # samplers of distilled models, which draw from other levels
    "lcm": {"_class_name": "LCMScheduler", "timestep_spacing": "leading", "original_inference_steps": 50},
    "tcd": {"_class_name": "TCDScheduler", "timestep_spacing": "leading", "original_inference_steps": 50},
}
_SOLVERS = {"dpmpp_2m": "DPMSolverMultistepScheduler", "unipc": "UniPCMultistepScheduler"}
_SPACINGS = {"leading": "leading", "leading_zero": "leading", "linspace": "linspace"}  # ours -> diffusers'
Data = TypeVar("Data", bound=BaseModel)
Beta = Annotated[float, Field(gt=0, lt=1)]


class Scheduler(NamedTuple):
    """The content of a scheduler config: the path, the prediction, and diffusers' sampler and grid.

    notes: sampling settings of the config that we handle differently.
    """

    path: Path
    prediction: str
    recommended: dict[str, Any]
    notes: tuple[str, ...] = ()


class _Config(BaseModel):
    """The keys of the path. The others are settings of samplers: see sampling.py."""

    model_config = ConfigDict(strict=True, extra="allow")

    num_train_timesteps: int = Field(1000, ge=2, le=100_000)
    prediction_type: Literal["epsilon", "sample", "v_prediction", "flow", "flow_prediction", "karras"] | None = None
    beta_schedule: str = "linear"
    beta_start: Beta = 0.0001
    beta_end: Beta = 0.02
    trained_betas: tuple[Annotated[float, Field(gt=0, le=1)], ...] | None = None
    rescale_betas_zero_snr: bool | None = False
    class_name: str = Field("", alias="_class_name")
    # of flow matching: by its own class, or by a multistep solver's
    use_flow_sigmas: bool | None = False
    flow_shift: float | None = Field(1.0, gt=0, le=100)
    shift: float = Field(1.0, gt=0, le=100)
    use_dynamic_shifting: bool | None = False
    base_image_seq_len: int | None = Field(256, ge=1)
    max_image_seq_len: int | None = Field(4096, ge=2)
    base_shift: float | None = Field(0.5, ge=-10, le=10)
    max_shift: float | None = Field(1.15, ge=-10, le=10)
    shift_terminal: float | None = Field(None, gt=0, lt=1)

    @model_validator(mode="after")
    def _flow_of_a_straight_path(self) -> _Config:
        if self.prediction_type == "flow_prediction" and not self.is_flow:
            raise ValueError("prediction_type flow_prediction requires use_flow_sigmas")
        return self

    @property
    def is_flow(self) -> bool:
        """Whether the path is straight."""
        return self.class_name == FLOW or bool(self.use_flow_sigmas)

    @property
    def prediction(self) -> str:
        """Our name of what the network predicts."""
        if self.prediction_type == "flow_prediction":
            return "flow"
        return self.prediction_type or ("flow" if self.is_flow else "epsilon")


def read_json_as(model: type[Data], path: FilePath) -> Data:
    """A JSON file of a model folder, validated as data. Raises ModelError naming the first fault."""
    try:
        return model.model_validate_json(path.read_bytes())
    except OSError:
        raise ModelError(f"{path.parent.name}/{path.name} is missing ({path})") from None
    except ValidationError as error:
        fault = first_fault(error)
        what = f"{path.name}: {fault.key}: {fault.message}" if fault.key else f"{path.name}: {fault.message}"
        plain = fault.missing or not fault.key
        raise ModelError(f"{what} ({path})" if plain else f"{what}, not {str(fault.got)[:40]!r} ({path})") from None


def read_path(file: FilePath) -> VariancePreserving:
    """The noise levels of a scheduler config. Raises ModelError."""
    config = read_json_as(_Config, file)
    with raised_as(ModelError, f"no noise schedule ({file})"):
        return _variance_preserving(config, file)


def read_scheduler(directory: FilePath) -> Scheduler:
    """The scheduler config of a model folder. Raises ModelError."""
    path = directory / FILE
    config = read_json_as(_Config, path)
    sampling = sampling_of(config.model_dump(by_alias=True))
    with raised_as(ModelError, f"no noise schedule ({path})"):
        return Scheduler(_path(config, path), config.prediction, *sampling)


def as_diffusers(model: Model) -> Any:
    """diffusers' scheduler of a model's path and prediction, of the class of its sampler where diffusers has one.

    Raises ConfigError for a class that requires a library which is not installed.
    """
    import diffusers

    defaults = model.card.defaults
    sampler, unet = defaults.get("sampler", "ddim"), "unet" in model.parts
    kind, flags = scheduler_of(sampler, defaults.get("spacing", "trailing"))
    config = scheduler_config(model.path, model.prediction, flags["timestep_spacing"], sampler, unet=unet) | flags
    if isinstance(model.path, Straight):
        kind = config["_class_name"]
    try:
        return getattr(diffusers, kind).from_config({key: value for key, value in config.items() if key[0] != "_"})
    except (ImportError, ValueError) as error:
        raise ConfigError(f"diffusers cannot make the scheduler: {one_line(error)}") from None


def sampling_for(model: Model, scheduler: Any) -> tuple[str, Sampling]:
    """The prediction of a scheduler object of diffusers, and the sampling that it asks of a model.

    Raises ConfigError for anything else, and for a scheduler of another path than the model's.
    """
    try:
        tree = {**dict(scheduler.config), "_class_name": type(scheduler).__name__}
        config = _Config.model_validate(tree, strict=False)
        path = _path(config, FilePath("scheduler"))
    except (AttributeError, TypeError, ValueError, ModelError) as error:
        raise ConfigError(f"scheduler must be a scheduler of diffusers: {str(error)[:100]}") from None
    if not _same(path, model.path):
        raise ConfigError("the scheduler has another noise schedule than the model")
    return config.prediction, sampling_of(tree)


def _same(first: Path, second: Path) -> bool:
    if isinstance(first, VariancePreserving) and isinstance(second, VariancePreserving):
        return bool(same_schedule(first, second))
    return first == second


def _path(config: _Config, file: FilePath) -> Path:
    return _straight(config) if config.is_flow else _variance_preserving(config, file)


def _straight(config: _Config) -> Straight:
    T = config.num_train_timesteps
    if config.class_name != FLOW:
        return Straight(config.flow_shift or 1.0, T=T)
    if not config.use_dynamic_shifting:
        return Straight(config.shift, T=T, terminal=config.shift_terminal)
    few, many = config.base_image_seq_len or 256, config.max_image_seq_len or 4096
    low, high = config.base_shift or 0.0, config.max_shift or 0.0
    if not few < many:
        raise ModelError("max_image_seq_len must be more than base_image_seq_len")
    return Straight(math.exp(low), ByTokens(few, low, many, high), T, config.shift_terminal)


def _variance_preserving(config: _Config, path: FilePath) -> VariancePreserving:
    """The path of betas. `trained_betas` lists those of schedules that diffusers has no name for."""
    T, kind = config.num_train_timesteps, config.beta_schedule
    if config.trained_betas is not None:
        if len(config.trained_betas) != T:
            raise ModelError(f"trained_betas has {len(config.trained_betas)} entries for {T} times ({path})")
        made = VariancePreserving.from_betas(np.asarray(config.trained_betas, np.float64))
    elif kind == "squaredcos_cap_v2":
        made = VariancePreserving.cosine(T)
    elif kind in ("linear", "scaled_linear"):
        make = VariancePreserving.linear if kind == "linear" else VariancePreserving.scaled_linear
        made = make(T, config.beta_start, config.beta_end)
    else:
        raise ModelError(f"unknown beta_schedule {kind!r} ({path}). Known: {', '.join(_KINDS)}")
    return made.zero_terminal_snr() if config.rescale_betas_zero_snr else made


def scheduler_config(
    path: Path, prediction: str, spacing: str = "leading", sampler: str = "ddim", *, unet: bool = False
) -> dict[str, Any]:
    """diffusers' config of a path: DDIM's for a variance-preserving path, flow matching's for a straight one.

    Models that are distilled for few steps have their sampler's own. Betas are listed if none of diffusers' kinds
    describes them. unet: diffusers' pipelines of U-Nets cannot use the scheduler of flow matching, but multistep
    solvers on the same path.
    """
    if isinstance(path, Straight):
        plain = path.growth is None and path.terminal is None
        return _solver_config(path, sampler) if unet and plain else _flow_config(path, prediction)
    assert isinstance(path, VariancePreserving)
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": path.T,
        "prediction_type": prediction,
        "timestep_spacing": _SPACINGS.get(spacing, "trailing"),
        "steps_offset": 0 if spacing == "leading_zero" else 1,
        "clip_sample": False,
        "set_alpha_to_one": True,
        **_described(path),
        **_DISTILLED.get(sampler, {}),
    }


def _solver_config(path: Straight, sampler: str) -> dict[str, Any]:
    """A solver of second order if the sampler is one, else of the first, which is Euler's method."""
    order = 2 if sampler in _SOLVERS else 1
    return {
        "_class_name": _SOLVERS.get(sampler, _SOLVERS["dpmpp_2m"]),
        "num_train_timesteps": path.T,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": path.shift,
        "solver_order": order,
    }


def _flow_config(path: Straight, prediction: str) -> dict[str, Any]:
    config: dict[str, Any] = {"_class_name": FLOW, "num_train_timesteps": path.T, "prediction_type": prediction}
    config |= {} if path.terminal is None else {"shift_terminal": path.terminal}
    if path.growth is None:
        return config | {"shift": path.shift, "use_dynamic_shifting": False}
    config |= {"shift": 1.0, "use_dynamic_shifting": True}
    if isinstance(growth := path.growth, ByTokens):  # other growth is its family's, and not in a config
        sizes = {"base_image_seq_len": growth.few, "max_image_seq_len": growth.many}
        config |= {**sizes, "base_shift": growth.low, "max_shift": growth.high}
    return config


def _described(path: VariancePreserving) -> dict[str, Any]:
    """The kind and flags that make diffusers compute the same schedule, or its betas."""
    known = {
        "linear": (VariancePreserving.linear(path.T), 0.0001, 0.02),
        "scaled_linear": (VariancePreserving.scaled_linear(path.T), 0.00085, 0.012),
        "squaredcos_cap_v2": (VariancePreserving.cosine(path.T), 0.0001, 0.02),
    }
    for kind, (plain, start, end) in known.items():
        for rescaled in (False, True):
            if same_schedule(plain.zero_terminal_snr() if rescaled else plain, path):
                ends = {"beta_schedule": kind, "beta_start": start, "beta_end": end}
                return ends | {"rescale_betas_zero_snr": rescaled}
    return {"trained_betas": path.betas.tolist(), "rescale_betas_zero_snr": False}


def same_schedule(first: VariancePreserving, second: VariancePreserving) -> bool:
    """Whether two schedules are equal up to rounding."""
    return first.T == second.T and np.allclose(first.alphas_cumprod, second.alphas_cumprod, rtol=1e-9, atol=1e-12)
