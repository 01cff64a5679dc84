"""The sampling settings that a model is saved with; a request may replace each of them."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from latentdiff.diffusion.grids import GRIDS
from latentdiff.diffusion.samplers import SAMPLERS
from latentdiff.settings.validation import one_of


class Recommended(BaseModel):
    """See the module; names are those of `Request`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    num_inference_steps: int = Field(20, ge=1, le=1000, description="sampling steps")
    guidance_scale: float = Field(3.0, ge=0, le=100, description="classifier-free guidance")
    sampler: Annotated[str, AfterValidator(partial(one_of, "sampler", tuple(SAMPLERS)))] = Field(
        "ddim", description="sampler"
    )
    spacing: Annotated[str, AfterValidator(partial(one_of, "spacing", GRIDS))] = Field(
        "trailing", description="grid of the steps"
    )
    guidance_renorm: bool = Field(False, description="guidance keeps the length of each token of the network's output")
