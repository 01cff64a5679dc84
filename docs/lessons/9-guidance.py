# %% [markdown]
# # 9. Guidance: what classifier-free guidance does to a distribution
#
# **Question.** `--cfg 7.5` makes pictures fit their prompt better. What does it change, and what does it cost?
#
# We look at it where everything is exact: two classes in the plane. Each class is a mixture of Gaussians, so the best
# denoiser of each, and of both together, is a formula.

# %%
import matplotlib.pyplot as plt
import numpy as np

from latentdiff.diffusion.guidance import classifier_free, paired, within
from latentdiff.diffusion.path import VariancePreserving
from latentdiff.diffusion.samplers import SAMPLERS

path = VariancePreserving.scaled_linear().zero_terminal_snr()
centres = {
    "A": np.array([[-1.2, 0.9], [-0.2, 0.0], [-1.4, -0.6]]),
    "B": np.array([[1.2, 0.9], [0.2, 0.0], [1.4, -0.6]]),
}
WIDTH = 0.22


def best(points):
    """The exact denoiser of equal Gaussians of deviation WIDTH around points (K, 2)."""

    def denoise(x, level):
        variance = (level.alpha * WIDTH) ** 2 + level.sigma**2
        exponents = -((x[:, None] - level.alpha * points[None]) ** 2).sum(-1) / (2 * variance)
        weights = np.exp(exponents - exponents.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        gain = level.alpha * WIDTH**2 / variance
        each = points[None] + gain * (x[:, None] - level.alpha * points[None])
        return (weights[..., None] * each).sum(1)

    return denoise


cond, uncond = best(centres["A"]), best(np.concatenate([*centres.values()]))
rng = np.random.default_rng(0)
start = rng.standard_normal((3000, 2))


def draw(denoise, steps=100):
    *_, last = SAMPLERS["heun"].walk(denoise, start, path.levels(steps, "trailing"), path=path)
    return last.x


# %% [markdown]
# ## The formula
#
#     guided = uncond + scale (cond - uncond)
#
# Scale 0 ignores the class, 1 is the class as it is, more goes beyond: away from what is common to both classes.

# %%
scales = (0.0, 1.0, 3.0, 7.5)
samples = {scale: draw(classifier_free(paired(uncond, cond), scale)) for scale in scales}
figure, axes = plt.subplots(1, 4, figsize=(12, 3.2), sharey=True)
for axis, (scale, points) in zip(axes, samples.items(), strict=True):
    for name, colour in (("A", "tab:blue"), ("B", "lightgray")):
        axis.scatter(*centres[name].T, s=900, color=colour, alpha=0.25)
    axis.plot(*points.T, "k.", markersize=1, alpha=0.4)
    axis.set(title=f"scale {scale:g}", xlim=(-3, 3), ylim=(-2, 2))

# %% [markdown]
# The middle part of A lies beside B, so guidance empties it: those samples could have been B. What remains is pushed
# outwards and shrinks.


# %%
def near_the_middle(points):
    distances = ((points[:, None] - centres["A"][None]) ** 2).sum(-1)
    return float((distances.argmin(1) == 1).mean())


for scale in scales[1:]:
    points = samples[scale]
    outer = points[((points - centres["A"][0]) ** 2).sum(-1) < 1]
    print(
        f"scale {scale:3g}: {near_the_middle(points):.2f} in the middle part (the class has 0.33), "
        f"deviation of the upper part {outer.std(0).mean():.3f} (the class has {WIDTH})"
    )
assert abs(near_the_middle(samples[1.0]) - 1 / 3) < 0.04
assert near_the_middle(samples[7.5]) < near_the_middle(samples[3.0]) < near_the_middle(samples[1.0])

# %% [markdown]
# So guidance gains agreement with the class and loses variety. It does **not** sample from a sharpened distribution
# p(x) p(class | x)^scale, although this is often said. At each noise level it follows the score of
# p(x_t) p(class | x_t)^scale, and these are not the noised versions of one distribution.
#
# ## Guidance in the middle only
#
# At high noise all samples are pushed the same way, which costs most variety; at low noise it changes little. Limiting it
# to an interval of log-SNR (Kynkaanniemi et al. 2024) keeps more of the class.

# %%
limited = draw(within(classifier_free(paired(uncond, cond), 3.0), cond, -1.0, 3.0))
print(f"scale 3 everywhere:  {near_the_middle(samples[3.0]):.2f} in the middle part")
print(f"scale 3 in (-1, 3):  {near_the_middle(limited):.2f}")
assert near_the_middle(limited) > near_the_middle(samples[3.0])

# %% [markdown]
# ## The same on pictures

# %%
from latentdiff import LatentDiffusionPipeline

pipe = LatentDiffusionPipeline.from_pretrained("scenes-64")
figure, axes = plt.subplots(4, 8, figsize=(9, 4.8))
for row, scale in enumerate((1.0, 2.0, 4.0, 8.0)):
    drawn = pipe("two green stars", seed=1, num_images_per_prompt=8, guidance_scale=scale).images
    for axis, picture in zip(axes[row], drawn, strict=True):
        axis.imshow(picture)
        axis.set(xticks=[], yticks=[])
    axes[row, 0].set_ylabel(f"scale {scale:g}")

# %% [markdown]
# **What to remember.**
#
# - Guidance extrapolates from the unconditional guess through the conditional one.
# - It trades variety for agreement. Too much leaves the data: colours saturate, shapes become simple.
# - It costs a second evaluation of the network a step.
#
# Try it: `latentdiff generate "two green stars" -m scenes-64 --vary cfg=1,2,4,8 -N 4 -s 1 --grid`.
