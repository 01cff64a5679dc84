"""Plots of what a model does, for people who want to see it: `latentdiff show`, and in Python

    from latentdiff import LatentDiffusionPipeline, show

    pipe = LatentDiffusionPipeline.from_pretrained()
    show.reverse(pipe, "a red circle", seed=1).save("reverse.png")

Every function returns a `Sheet`, which saves itself and displays itself in a notebook.
"""

from latentdiff.show.latents import latents
from latentdiff.show.maps import attention
from latentdiff.show.samplers import samplers
from latentdiff.show.schedule import schedule
from latentdiff.show.sheet import Sheet
from latentdiff.show.strips import forward, reverse

__all__ = ["Sheet", "attention", "forward", "latents", "reverse", "samplers", "schedule"]
