"""The sampling settings that a model is saved with, and drawn with unless others are asked for."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Recommended(BaseModel):
    """See the module; names are those of `Request`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    num_inference_steps: int = Field(20, ge=1, le=1000)
    guidance_scale: float = Field(3.0, ge=0, le=100)
    sampler: Literal["ddpm", "ddim", "euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "lcm"] = (
        "ddim"
    )
    spacing: Literal["trailing", "leading", "linspace", "karras", "uniform"] = "trailing"
