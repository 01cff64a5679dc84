"""latentdiff: the whole life of a latent text-to-image diffusion model, in one small package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentdiff.pipeline import LatentDiffusionPipeline

__all__ = ["LatentDiffusionPipeline", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Public names are imported when first used, so that importing the package costs nothing."""
    if name == "LatentDiffusionPipeline":
        from latentdiff.pipeline import LatentDiffusionPipeline

        return LatentDiffusionPipeline
    raise AttributeError(f"module 'latentdiff' has no attribute {name!r}")
