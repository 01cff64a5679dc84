"""The request for pictures, validated as data before anything is allocated."""

from __future__ import annotations

import secrets
from itertools import pairwise
from numbers import Integral, Real
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from latentdiff.core.errors import ConfigError
from latentdiff.diffusion.grids import GRIDS
from latentdiff.diffusion.noise import MAX_SEED
from latentdiff.diffusion.parametrization import PARAMETRIZATIONS
from latentdiff.diffusion.samplers import SAMPLERS
from latentdiff.drawing.presets import settled
from latentdiff.settings.validation import Fault, did_you_mean, first_fault, one_of

LONGEST_PROMPT = 10_000  # characters
LARGEST_BATCH = 1024
LONGEST = 2048  # pixels of a side
IMAGE_GUIDANCE = 1.5  # of InstructPix2Pix
REFINER_SWITCH = 0.8  # Podell et al. 2023: the refiner is trained on the last fifth of the levels
LARGEST_SCALE = 10.0  # of an image prompt
_OTHER_NAMES = {  # of other tools, and of our command line
    "steps": "num_inference_steps",
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "scheduler": "sampler",
    "num_images_per_prompt": "num_images",
    "denoising_strength": "strength",
    "mask": "mask_image",
    "adapter_conditioning_scale": "controlnet_conditioning_scale",
}

EACH_CONTROL = (  # settings with one value for all controls, or one for each
    "controlnet_conditioning_scale",
    "control_guidance_start",
    "control_guidance_end",
    "control_mode",
)

Finite = Annotated[float, Field(allow_inf_nan=False)]
Fraction = Annotated[Finite, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Pixels = Annotated[int, Field(ge=0, le=65_536)]


class Request(BaseModel):
    """One call: `num_images` pictures of one prompt; picture i has seed `seed + i`.

    Sizes are None for the model's, or the input picture's. Guidance is on if guidance_scale > 1, or true_cfg_scale > 1
    for a model that reads guidance_scale. Other settings of None or 0 are off, or the model's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    prompt: str = Field(max_length=LONGEST_PROMPT, description="what to draw; empty is unconditional")
    negative_prompt: str = Field("", max_length=LONGEST_PROMPT, description="what not to draw")
    width: int | None = Field(None, description="pixels; none: the model's, or the picture's")
    height: int | None = Field(None, description="pixels; none: the model's, or the picture's")
    num_inference_steps: int = Field(50, ge=1, le=1000, description="sampling steps")
    sampler: str = Field("ddim", description="the sampler")
    spacing: str = Field("trailing", description="the grid of the steps")
    timesteps: tuple[Finite, ...] | None = Field(
        None, min_length=1, max_length=1000, description="the caller's own times, falling, instead of a spacing"
    )
    sigmas: tuple[Finite, ...] | None = Field(
        None, min_length=1, max_length=1000, description="the caller's own sigma / alpha, falling, instead of a spacing"
    )
    eta: Fraction | None = Field(None, description="noise that a stochastic sampler adds; none: the sampler's default")
    prediction: str | None = Field(None, description="what the network predicts, where the model's files are wrong")
    churn: Annotated[Finite, Field(ge=0, le=1000)] | None = Field(
        None, description="noise that heun adds (Karras et al. 2022, algorithm 2)"
    )
    seed: Seed = Field(default_factory=lambda: secrets.randbelow(2**32), description="picture i has seed + i")
    num_images: int = Field(1, ge=1, le=10_000, description="pictures of the prompt")
    batch_size: int = Field(8, ge=1, le=LARGEST_BATCH, description="pictures that are drawn at once")

    # how the prompt is read, see networks/encoders/prompt.py
    prompt_weights: bool = Field(True, description="whether brackets and BREAK have a meaning")
    long_prompts: bool = Field(True, description="whether a long prompt is read in chunks, or cut")
    clip_skip: int | None = Field(
        None, ge=0, le=100, description="number of the text encoder's last layers to leave out"
    )
    original_size: tuple[Pixels, Pixels] | None = Field(
        None, description="for models that read sizes: (height, width) of the picture as it was; none: the picture's"
    )
    crop: tuple[Pixels, Pixels] = Field((0, 0), description="for models that read sizes: (top, left) of the crop")

    # guidance, see diffusion/guidance.py
    guidance_scale: Finite = Field(7.5, ge=0, le=100, description="classifier-free guidance; 1 is none")
    true_cfg_scale: Finite = Field(
        1.0, ge=0, le=100, description="classifier-free guidance of a model that reads its guidance_scale"
    )
    image_guidance_scale: Finite = Field(
        IMAGE_GUIDANCE, ge=1, le=100, description="guidance by the picture of models that edit (Brooks et al. 2023)"
    )
    guidance_rescale: Fraction = Field(0.0, description="restores the unguided contrast (Lin et al. 2023)")
    guidance_renorm: bool = Field(False, description="keeps the length of each token of the network's output")
    guidance_interval: tuple[Finite, Finite] | None = Field(
        None, description="values of log(alpha / sigma) between which guidance acts (Kynkaanniemi et al. 2024)"
    )
    threshold: Annotated[Finite, Field(gt=0, le=1)] | None = Field(
        None, description="quantile of dynamic thresholding (Saharia et al. 2022)"
    )
    apg: bool = Field(False, description="adaptive projected guidance (Sadat et al. 2024)")
    apg_eta: Finite = Field(0.0, ge=-10, le=10, description="share of the parallel part")
    apg_norm: Annotated[Finite, Field(gt=0, le=1e6)] | None = Field(None, description="largest norm of the difference")
    apg_momentum: Finite = Field(0.0, ge=-1, le=1, description="momentum of the difference")
    pag_scale: Finite = Field(0.0, ge=0, le=100, description="perturbed-attention guidance (Ahn et al. 2024)")
    autoguidance_scale: Finite = Field(
        1.0, ge=0, le=100, description="guidance by a weaker model (Karras et al. 2024); 1 is none"
    )
    clip_guidance_scale: Finite = Field(0.0, ge=0, le=10_000, description="guidance by CLIP's gradient")

    # controls, one value for all or one for each, see networks/controls
    controlnet_conditioning_scale: tuple[Annotated[Finite, Field(ge=-10, le=10)], ...] = Field(
        (), max_length=20, description="how strongly each control acts; none: 1"
    )
    control_guidance_start: tuple[Fraction, ...] = Field(
        (), max_length=20, description="share of the steps at which each control begins to act; none: 0"
    )
    control_guidance_end: tuple[Fraction, ...] = Field(
        (), max_length=20, description="share of the steps at which each control ends; none: 1"
    )
    control_mode: tuple[Annotated[int, Field(ge=0, le=100)], ...] = Field(
        (), max_length=20, description="the kind of each control's picture, for ControlNets that know several"
    )
    ip_adapter_scale: tuple[Finite | dict[str, Any], ...] = Field(
        (), max_length=20, description="how strongly each image prompt acts, in all blocks or by block; none: 1"
    )
    guess_mode: bool = Field(False, description="controls act on the prompt alone, less on finer levels")

    cache_interval: int = Field(
        1, ge=1, le=100, description="deep features are computed in one of so many evaluations (Ma et al. 2024)"
    )

    # where sampling starts and ends
    strength: Fraction | None = Field(
        None, description="share of the noise that an input picture gets; none: 0.8, with a mask 1"
    )
    noise_level: int | None = Field(
        None, ge=0, le=1000, description="time of the noise that a small picture gets before it is enlarged"
    )
    mask_blur: Finite = Field(0.0, ge=0, le=256, description="pixels: softens the edge of a mask, or of outpainting")
    padding_mask_crop: int | None = Field(
        None, ge=0, le=LONGEST, description="draws only the masked part, with so many pixels around, at width x height"
    )
    refiner_switch: Annotated[Finite, Field(gt=0, lt=1)] | None = Field(
        None, description=f"share of the levels after which the refiner goes on; none: {REFINER_SWITCH}"
    )
    hires_scale: Annotated[Finite, Field(gt=1, le=8)] | None = Field(
        None, description="size of the second pass over the first's"
    )
    hires_strength: Fraction | None = Field(None, description="share of the noise that the second pass adds; none: 0.5")
    variation_seed: Seed | None = Field(None, description="seed of the noise that is mixed in")
    variation_strength: Fraction = Field(0.0, description="share of that noise")
    vae_tiling: bool = Field(False, description="decode in tiles")
    vae_slicing: bool = Field(False, description="decode picture by picture")

    def cfg(self, reads_guidance: bool) -> float:
        """The scale of classifier-free guidance; 1 or less is none. reads_guidance: see Model.reads_guidance."""
        return self.true_cfg_scale if reads_guidance else self.guidance_scale

    @field_validator("sampler")
    @classmethod
    def _known_sampler(cls, value: str) -> str:
        return one_of("sampler", tuple(SAMPLERS), value)

    @field_validator("spacing")
    @classmethod
    def _known_spacing(cls, value: str) -> str:
        return one_of("spacing", GRIDS, value)

    @field_validator("prediction")
    @classmethod
    def _known_prediction(cls, value: str | None) -> str | None:
        return None if value is None else one_of("prediction", tuple(PARAMETRIZATIONS), value)

    @field_validator("ip_adapter_scale")
    @classmethod
    def _scales(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        for value in values:
            _check_scale(value)
        return values

    @field_validator("guidance_interval")
    @classmethod
    def _in_order(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value and value[0] > value[1]:
            raise ValueError("the lower end must come first")
        return value

    @model_validator(mode="after")
    def _own_levels(self) -> Request:
        own = self.timesteps or self.sigmas
        if own is None:
            return self
        if self.timesteps and self.sigmas:
            raise ValueError("timesteps and sigmas exclude each other")
        lowest = own[-1] if self.timesteps else own[-1] or -1.0  # time 0 has noise, sigma 0 has none
        if any(later >= earlier for earlier, later in pairwise(own)) or lowest < 0:
            raise ValueError("timesteps must fall and be at least 0, sigmas must fall and be over 0")
        if len(own) != self.num_inference_steps:
            raise ValueError(f"{len(own)} timesteps or sigmas for {self.num_inference_steps} num_inference_steps")
        return self

    @model_validator(mode="after")
    def _each_has_a_meaning(self) -> Request:
        """Refuse settings without effect."""
        for name in ("eta", "churn"):
            if getattr(self, name) is not None and name not in SAMPLERS[self.sampler].options:
                takers = [sampler for sampler, row in SAMPLERS.items() if name in row.options]
                raise ValueError(f"{name} has no effect on {self.sampler}; it applies to {', '.join(takers)}")
        if not self.apg and (self.apg_eta or self.apg_norm is not None or self.apg_momentum):
            raise ValueError("apg_eta, apg_norm and apg_momentum require apg = true")
        has_strength = self.variation_strength or "variation_strength" in self.model_fields_set
        if (self.variation_strength and self.variation_seed is None) or (
            self.variation_seed is not None and not has_strength
        ):
            raise ValueError("a variation requires both variation_seed and variation_strength")
        if self.hires_strength is not None and self.hires_scale is None:
            raise ValueError("hires_strength requires hires_scale")
        if self.variation_seed is not None and self.variation_seed + self.num_images - 1 > MAX_SEED:
            raise ValueError(f"variation_seed: the last picture's is over {MAX_SEED}")
        return self


def _check_scale(scale: Any) -> None:
    """Raises ValueError unless a scale is a number, or numbers by block."""
    for value in scale.values() if isinstance(scale, dict) else (scale,):
        for each in value if isinstance(value, list | tuple) else (value,):
            if isinstance(each, dict) and isinstance(scale, dict) and each:
                _check_scale(each)
            elif isinstance(each, bool) or not isinstance(each, int | float) or not abs(each) <= LARGEST_SCALE:
                raise ValueError(f"a scale must be a number up to {LARGEST_SCALE:g}, for all blocks or by block")


def request(**fields: Any) -> Request:
    """A validated request; the first fault is raised as a ConfigError in one line."""
    fields = {name: _plain(value) for name, value in settled({}, fields).items()}
    for name in ("timesteps", "sigmas"):
        if fields.get(name) is not None and not isinstance(fields[name], tuple):
            raise ConfigError(f"{name} must be a list of numbers (got {str(fields[name])[:40]!r})")
    if fields.get("sigmas") and fields["sigmas"][-1] == 0:
        fields["sigmas"] = fields["sigmas"][:-1]  # diffusers' lists end at 0, which every walk does
    for name in (*EACH_CONTROL, "ip_adapter_scale"):
        if name in fields and not isinstance(fields[name], tuple):
            fields[name] = (fields[name],)
    own = fields.get("timesteps") or fields.get("sigmas")
    if own and "num_inference_steps" not in fields:
        fields["num_inference_steps"] = len(own)
    try:
        made = Request(**{name: value for name, value in fields.items() if (name, value) != ("seed", None)})
    except ValidationError as error:
        raise _refusal(first_fault(error)) from None
    if made.seed + made.num_images - 1 > MAX_SEED:
        raise ConfigError(
            f"seed: the last picture's seed is over {MAX_SEED} (seed {made.seed}, {made.num_images} pictures)"
        )
    return made


def _plain(value: Any) -> Any:
    """Python's own numbers for NumPy's, and tuples for lists and arrays."""
    if isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if hasattr(value, "tolist") and getattr(value, "ndim", 0) == 1:  # an array
        value = value.tolist()
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


def _refusal(fault: Fault) -> ConfigError:
    if fault.unknown:
        near = did_you_mean(fault.key, Request.model_fields, _OTHER_NAMES)
        return ConfigError(f"unknown setting {fault.key[:40]!r}{near}")
    if not fault.path:
        return ConfigError(fault.message)
    got = repr(fault.got)
    text = got if len(got) <= 40 else f"{got[:30]}... of {len(str(fault.got))} characters"
    is_quoted = repr(fault.got) in fault.message
    return ConfigError(f"{fault.key}: {fault.message}" + ("" if is_quoted else f" (got {text})"))


def check_size(name: str, value: int, multiple: int) -> int:
    """Raises ConfigError for a side in pixels that the networks cannot draw."""
    if not (multiple <= value <= LONGEST and value % multiple == 0):
        raise ConfigError(f"{name} must be a multiple of {multiple} from {multiple} to {LONGEST} (got {value})")
    return value
