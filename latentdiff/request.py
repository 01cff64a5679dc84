"""What is asked of the pipeline, validated as data before anything is allocated."""

from __future__ import annotations

import secrets
from numbers import Integral
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from latentdiff.diffusion.noise import MAX_SEED
from latentdiff.diffusion.samplers import SAMPLERS
from latentdiff.diffusion.schedule import SPACINGS
from latentdiff.errors import ConfigError

LONGEST_PROMPT = 10_000  # characters
SIDES = (64, 2048)  # pixels
WITH_ETA = ("ddim", "euler_ancestral")

Finite = Annotated[float, Field(allow_inf_nan=False)]


class Request(BaseModel):
    """One call: `num_images` pictures of one prompt; picture i has seed `seed + i`.

    Sizes are None for the model's own. Guidance is on where guidance_scale > 1.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    prompt: str = Field(min_length=1, max_length=LONGEST_PROMPT)
    negative_prompt: str = Field("", max_length=LONGEST_PROMPT)
    width: int | None = None
    height: int | None = None
    num_inference_steps: int = Field(50, ge=1, le=1000)
    guidance_scale: Finite = Field(7.5, ge=0, le=100)
    guidance_rescale: Finite = Field(0.0, ge=0, le=1)
    guidance_interval: tuple[Finite, Finite] | None = None
    sampler: str = "ddim"
    spacing: str = "trailing"
    eta: Annotated[Finite, Field(ge=0, le=1)] | None = None  # the sampler's own
    seed: int = Field(default_factory=lambda: secrets.randbelow(2**32), ge=0, le=MAX_SEED)
    num_images: int = Field(1, ge=1, le=10_000)
    batch_size: int = Field(8, ge=1, le=1024)

    @field_validator("sampler")
    @classmethod
    def _known_sampler(cls, value: str) -> str:
        return _one_of("sampler", value, tuple(SAMPLERS))

    @field_validator("spacing")
    @classmethod
    def _known_spacing(cls, value: str) -> str:
        return _one_of("spacing", value, SPACINGS)

    @field_validator("guidance_interval")
    @classmethod
    def _in_order(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value and value[0] > value[1]:
            raise ValueError("the lower end comes first")
        return value

    @model_validator(mode="after")
    def _eta_has_a_meaning(self) -> Request:
        if self.eta is not None and self.sampler not in WITH_ETA:
            raise ValueError(f"eta is of {' and '.join(WITH_ETA)}, not of {self.sampler}")
        return self


def _one_of(name: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}; one of {', '.join(known)}")
    return value


def request(**fields: Any) -> Request:
    """A validated request; the first fault is raised as a ConfigError in one line."""
    if isinstance(fields.get("seed"), Integral) and not isinstance(fields["seed"], bool):
        fields["seed"] = int(fields["seed"])  # NumPy's integers too
    try:
        made = Request(**{name: value for name, value in fields.items() if (name, value) != ("seed", None)})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        if not name:  # of several fields together
            raise ConfigError(message) from None
        got = repr(first["input"])
        shown = got if len(got) <= 40 else f"{got[:30]}... of {len(str(first['input']))} characters"
        raise ConfigError(f"{name}: {message} (got {shown})") from None
    if not made.prompt.strip():
        raise ConfigError("prompt is empty. Say what to draw")
    if made.seed + made.num_images - 1 > MAX_SEED:
        raise ConfigError(
            f"seed: the last picture's seed is over {MAX_SEED} (seed {made.seed}, {made.num_images} pictures)"
        )
    return made


def check_size(name: str, value: int, multiple: int, lowest: int = SIDES[0]) -> int:
    """A side in pixels that the networks can draw; `lowest` is less for models of small pictures."""
    low, high = lowest, SIDES[1]
    if not (low <= value <= high and value % multiple == 0):
        raise ConfigError(f"{name} must be a multiple of {multiple} from {low} to {high} (got {value})")
    return value
