# %% [markdown]
# # 2. The forward process: from picture to noise
#
# **Question.** Diffusion models learn to undo noise. What noise, and how much of it when?
#
# One step of the forward process shrinks the picture a little and adds a little noise:
#
#     q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t)
#
# A *schedule* is the list of betas.

# %%
import matplotlib.pyplot as plt
import numpy as np

from latentdiff import LatentDiffusionPipeline
from latentdiff.diffusion.level import CLEAN
from latentdiff.diffusion.path import VariancePreserving
from latentdiff.diffusion.process import diffuse, diffuse_step

rng = np.random.default_rng(0)
schedules = {
    "linear": VariancePreserving.linear(),
    "quadratic": VariancePreserving.scaled_linear(),  # linear in sqrt(beta): Stable Diffusion's
    "cosine": VariancePreserving.cosine(),
}

# %% [markdown]
# ## One step, and the jump
#
# Gaussian noise on Gaussian noise is Gaussian noise. So the steps 1 to t can be done at once:
#
#     q(x_t | x_0) = N(alpha_t x_0, sigma_t^2),   alpha_t^2 = (1 - beta_1) ... (1 - beta_t),   alpha_t^2 + sigma_t^2 = 1
#
# We check it: 20,000 walks of 100 single steps, beside one jump.

# %%
path, x0 = schedules["linear"], 0.8
walk, before = np.full(20_000, x0), CLEAN
for t in range(100):
    level = path.level(t)
    walk = diffuse_step(walk, rng.standard_normal(walk.shape), before, level)
    before = level
jump = diffuse(x0, rng.standard_normal(20_000), path.level(99))
print(f"100 steps: mean {walk.mean():.3f}, deviation {walk.std():.3f}")
print(f"the jump:  mean {jump.mean():.3f}, deviation {jump.std():.3f}")
print(f"formula:   mean {path.level(99).alpha * x0:.3f}, deviation {path.level(99).sigma:.3f}")
assert abs(walk.mean() - path.level(99).alpha * x0) < 5 * path.level(99).sigma / np.sqrt(20_000)
assert abs(walk.std() / path.level(99).sigma - 1) < 0.03

# %% [markdown]
# This is why training is cheap: a noisy picture of any time costs one jump, not t steps.
#
# ## Three schedules
#
# The same picture at the same times.

# %%
pipe = LatentDiffusionPipeline.from_pretrained("scenes-64")
picture = np.asarray(pipe("a red circle above a blue square", seed=1).images[0]) / 127.5 - 1
noise = rng.standard_normal(picture.shape)
times = [0, 100, 250, 400, 550, 700, 850, 999]
figure, axes = plt.subplots(3, len(times), figsize=(len(times) * 1.2, 4))
for row, (name, path) in enumerate(schedules.items()):
    for column, t in enumerate(times):
        shown = diffuse(picture, noise, path.level(t))
        axes[row, column].imshow((shown.clip(-1, 1) + 1) / 2)
        axes[row, column].set(xticks=[], yticks=[], title=f"t = {t}" if row == 0 else "")
    axes[row, 0].set_ylabel(name)

# %% [markdown]
# The **signal-to-noise ratio**, SNR = (alpha / sigma)^2, tells the schedules apart better than the eye.

# %%
figure, axis = plt.subplots(figsize=(6, 3.5))
for name, path in schedules.items():
    axis.plot([2 * np.log10(path.level(t).alpha / path.level(t).sigma) for t in range(1000)], label=name)
axis.axhline(0, color="gray", linewidth=0.5)
axis.set(xlabel="t", ylabel="log10 SNR", ylim=(-6, 4.5))
axis.legend(frameon=False)
for name, path in schedules.items():
    half = next(t for t in range(1000) if path.level(t).alpha < path.level(t).sigma)
    print(f"{name:10} as much noise as signal from t = {half}; SNR at the end {path.level(999).snr:.1e}")

# %% [markdown]
# The linear and the quadratic schedule end with a little signal left. A model trained on them has never seen pure noise,
# but sampling starts there. `zero_terminal_snr` rescales a schedule so that nothing is left (Lin et al. 2023).

# %%
mended = schedules["quadratic"].zero_terminal_snr()
assert mended.level(999).alpha == 0
assert np.isclose(mended.level(0).alpha, schedules["quadratic"].level(0).alpha)

# %% [markdown]
# ## Small pictures disappear sooner
#
# Noise hits each pixel on its own, but what a picture shows covers many pixels. Averaging 4 x 4 pixels keeps what is
# shown and divides the deviation of the noise by 4. So the same schedule is gentler on large pictures.

# %%
level = schedules["quadratic"].level(400)
large = picture.repeat(4, 0).repeat(4, 1)  # 256 x 256
figure, axes = plt.subplots(1, 3, figsize=(7.5, 2.7))
small_noisy = diffuse(picture, rng.standard_normal(picture.shape), level)
large_noisy = diffuse(large, rng.standard_normal(large.shape), level)
pooled = large_noisy.reshape(64, 4, 64, 4, 3).mean((1, 3))
for axis, (name, shown) in zip(
    axes, {"64 pixels": small_noisy, "256 pixels": large_noisy, "256, averaged to 64": pooled}.items(), strict=True
):
    axis.imshow((shown.clip(-1, 1) + 1) / 2)
    axis.set(xticks=[], yticks=[], title=name)
noise_left = [(shown - level.alpha * picture).std() for shown in (small_noisy, pooled)]
print(f"noise of a pixel: {noise_left[0]:.3f}; after averaging 16 pixels: {noise_left[1]:.3f}")
assert abs(noise_left[0] / noise_left[1] / 4 - 1) < 0.02

# %% [markdown]
# **What to remember.**
#
# - A forward step shrinks and adds noise; t steps are one jump in closed form.
# - The schedule decides how much time a model spends at each noise level. Compare schedules by their SNR.
# - The larger the picture, the more noise it needs. This is one reason why schedules are *shifted* for large pictures.
#
# Try it: `latentdiff show schedule`, `latentdiff show forward photo.png`.
