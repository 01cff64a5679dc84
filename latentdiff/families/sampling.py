"""What a diffusers scheduler config means here: a sampler, a grid, and what we do differently.

Every class of diffusers has defaults of its own, which a config need not state. Keys that change pictures are honoured
or named in a note.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from latentdiff.diffusion.samplers import SAMPLERS, sampler_of

FLOW = "FlowMatchEulerDiscreteScheduler"
_OTHERWISE = "dpmpp_2m"  # of classes without a sampler of ours
_OPEN = {"leading": "leading_open", "linspace": "linspace_open"}  # of multistep solvers
_EXACT = {"linspace": "linspace_exact"}  # of solvers by ratio, whose default is linspace
_LCM = dict.fromkeys(("leading", "linspace", "trailing"), "distilled")
_GRIDS: dict[str, tuple[str, Mapping[str, str]]] = {  # class -> its default spacing, and our names of its grids
    "DDIMScheduler": ("leading", {}),
    "DDPMScheduler": ("leading", {}),
    "PNDMScheduler": ("leading", {}),
    "DPMSolverMultistepScheduler": ("linspace", _OPEN),
    "UniPCMultistepScheduler": ("linspace", _OPEN),
    "DEISMultistepScheduler": ("linspace", _OPEN),
    "LCMScheduler": ("leading", _LCM),
    "TCDScheduler": ("leading", _LCM),
    FLOW: ("trailing", {}),
}
_THEIRS = {ours: theirs for grids in (_OPEN, _EXACT, {"leading": "distilled"}) for theirs, ours in grids.items()}
_SIGMAS = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential"}
_HONOURED: dict[str, tuple[Any, ...]] = {  # key -> the values that mean what we do
    "solver_order": (None, 2),
    "solver_type": (None, "midpoint", "bh2", "logrho"),
    "algorithm_type": (None, "dpmsolver++", "sde-dpmsolver++", "deis"),
    "final_sigmas_type": (None, "zero"),
    "predict_x0": (None, True),
    "disable_corrector": (None, []),
    "euler_at_final": (None, False),
    "use_beta_sigmas": (None, False),
    "use_lu_lambdas": (None, False),
    "thresholding": (None, False),
    "clip_sample": (None, False),
    "interpolation_type": (None, "linear"),
    "timestep_type": (None, "discrete"),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "original_inference_steps": (None, 50),
    "variance_type": (None, "fixed_small"),
    "stochastic_sampling": (None, False),
    "time_shift_type": (None, "exponential"),
    "invert_sigmas": (None, False),
    "lambda_min_clipped": (None, -math.inf, "-Infinity", "-inf"),
}


_SDE = {"algorithm_type": "sde-dpmsolver++"}


class Sampling(NamedTuple):
    """The recommended sampler and spacing, and notes on what the config sets and we do otherwise."""

    settings: dict[str, Any]
    notes: tuple[str, ...]


def scheduler_of(sampler: str, spacing: str) -> tuple[str, dict[str, Any]]:
    """The class of diffusers that a sampler stands for, DDIM's if there is none, and the keys of its config.

    The reverse of `sampling_of`.
    """
    flags: dict[str, Any] = {key: True for key, grid in _SIGMAS.items() if grid == spacing}
    flags["timestep_spacing"] = "linspace" if flags else _THEIRS.get(spacing, spacing)
    if spacing == "leading_zero":
        flags |= {"timestep_spacing": "leading", "steps_offset": 0}
    if sampler == "dpmpp_2m_sde":
        return "DPMSolverMultistepScheduler", flags | _SDE
    if sampler == "plms":
        flags["skip_prk_steps"] = True
    return next(iter(SAMPLERS[sampler].schedulers), "DDIMScheduler"), flags


def _sampler(name: str, config: Mapping[str, Any]) -> tuple[str | None, dict[str, tuple[Any, ...]]]:
    """Our sampler of a class, if there is one, and the values that mean what it does."""
    sampler = sampler_of(name)
    if sampler == "dpmpp_2m" and str(config.get("algorithm_type") or "").startswith("sde"):
        return "dpmpp_2m_sde", _HONOURED
    if sampler == "dpmpp_2m" and config.get("solver_order") == 1:
        return "ddim", _HONOURED | {"solver_order": (1,)}  # DPM-Solver++ of order 1 is DDIM
    return sampler, _HONOURED


def sampling_of(config: Mapping[str, Any]) -> Sampling:
    """The sampling that a scheduler config describes, as diffusers reads it."""
    name = str(config.get("_class_name") or "")
    sampler, honoured = _sampler(name, config)
    notes = [f"{key}={str(config[key])[:40]}" for key, values in honoured.items() if config.get(key) not in values]
    if sampler is None and name:
        notes.insert(0, name[:60])
    if name == "PNDMScheduler" and not config.get("skip_prk_steps"):
        notes.append("skip_prk_steps=False")
    by_ratio = sampler is not None and SAMPLERS[sampler].by_ratio
    usual, ours = _GRIDS.get(name, ("linspace", _EXACT) if by_ratio else ("leading", {}))
    is_flow = name == FLOW or config.get("use_flow_sigmas")
    stated = "trailing" if is_flow else str(config.get("timestep_spacing") or usual)
    spacing = ours.get(stated, stated if stated in ("leading", "linspace", "trailing") else "trailing")
    if name in ("DDIMScheduler", "PNDMScheduler") and stated == "linspace":
        notes.append("timestep_spacing=linspace")  # diffusers' would step from other times than it has reached
    if spacing == "leading" and config.get("steps_offset", 0) == 0:
        spacing = "leading_zero"
    elif spacing.startswith("leading") and config.get("steps_offset", 0) != 1:
        notes.append(f"steps_offset={config.get('steps_offset', 0)}")
    for key, grid in _SIGMAS.items():
        if config.get(key):
            spacing = grid
            ranged = ours is _EXACT and stated != "linspace"  # diffusers' range is then that of the spaced times
            if ranged or (ours is _OPEN and grid == "exponential"):
                notes.append(f"{key} with timestep_spacing={stated}")
    return Sampling({"sampler": sampler or _OTHERWISE, "spacing": spacing}, tuple(notes))
