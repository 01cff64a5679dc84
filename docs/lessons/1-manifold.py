# %% [markdown]
# # 1. Pictures live on a manifold
#
# **Question.** A generative model learns the distribution of pictures. What does that distribution look like, and why
# does a model need many steps to draw from it?
#
# We take the 1,797 handwritten digits of scikit-learn. Each has 8 x 8 pixels, so a picture is a point in a space of 64
# dimensions. Values are scaled to [-1, 1].

# %%
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

from latentdiff.diffusion.path import VariancePreserving
from latentdiff.diffusion.samplers import ddim

digits = load_digits().data / 8 - 1  # (1797, 64)
rng = np.random.default_rng(0)


def show(rows, titles=None):
    """Rows of pictures, (N, 64) each."""
    figure, axes = plt.subplots(len(rows), len(rows[0]), figsize=(len(rows[0]), len(rows)), squeeze=False)
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            axes[row, column].imshow(picture.reshape(8, 8), cmap="gray", vmin=-1, vmax=1)
            axes[row, column].set_axis_off()
    for axis, title in zip(axes[0], titles or (), strict=False):
        axis.set_title(title, fontsize=8)


show([digits[:10], rng.uniform(-1, 1, (10, 64))])

# %% [markdown]
# The second row has random pixels. None of them looks like a digit, and none ever will: digits fill a tiny part of the
# space. How tiny? The principal components say how many directions the digits use.

# %%
spread = np.linalg.svd(digits - digits.mean(0), compute_uv=False) ** 2
share = spread.cumsum() / spread.sum()
for part in (0.5, 0.9, 0.99):
    print(f"{part:.0%} of the variance lies in {np.searchsorted(share, part) + 1} of 64 directions")
assert np.searchsorted(share, 0.9) + 1 < 25

# %% [markdown]
# ## The likelihood of data
#
# A density says how likely a picture is. The simplest one puts a small Gaussian around every known digit (a kernel
# density estimate). Its log-likelihood separates unseen digits from random pixels by hundreds of nats.

# %%
known, unseen = digits[:1500], digits[1500:]


def log_likelihood(points, width=0.3):
    """The log density of points (N, 64) under a Gaussian of that width around each known digit."""
    squared = ((points[:, None] - known[None]) ** 2).sum(-1)
    exponents = -squared / (2 * width**2)
    most = exponents.max(1, keepdims=True)
    total = np.log(np.exp(exponents - most).sum(1)) + most[:, 0]
    return total - np.log(len(known)) - 32 * np.log(2 * np.pi * width**2)


noise = rng.uniform(-1, 1, (200, 64))
halfway = (unseen[:200] + unseen[rng.permutation(200)]) / 2
for name, points in (
    ("unseen digits", unseen[:200]),
    ("halfway between two digits", halfway),
    ("random pixels", noise),
):
    print(f"{name:28} {log_likelihood(points).mean():8.0f} nats")
assert log_likelihood(unseen[:200]).mean() > log_likelihood(halfway).mean() > log_likelihood(noise).mean()

# %% [markdown]
# Means of two digits are less likely than digits. The set of digits is curved: a straight line between two of
# its points leaves it. This is what people mean by *manifold*.
#
# ## Why one step is not enough
#
# Suppose a network must turn noise into a picture in one step. Many digits are possible for one noise, and the network
# is trained on squared error, so the best it can answer is their **mean**. For a finite set of pictures we know this
# best answer exactly: the mean of the pictures, each weighted by the likelihood of the noisy one given it.

# %%
path = VariancePreserving.scaled_linear().zero_terminal_snr()  # the first level has no signal at all


def best_denoiser(x, level):
    """E[x0 | x_t] when x0 is one of the known digits: x_t = alpha x0 + sigma noise."""
    exponents = -((x[:, None] - level.alpha * known[None]) ** 2).sum(-1) / (2 * level.sigma**2)
    weights = np.exp(exponents - exponents.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True) @ known


start = rng.standard_normal((8, 64))
rows = []
for steps in (1, 2, 5, 20, 100):
    *_, last = ddim(best_denoiser, start, path.levels(steps, "trailing"))
    rows.append(last.x)
show(rows)

# %% [markdown]
# Rows: the same noise in 1, 2, 5, 20 and 100 steps. One step gives the mean of all digits,
# whatever the noise. With more steps, each goes only part of the way to its guess, and the next guesses again.

# %%
to_mean = np.abs(rows[0] - known.mean(0)).max()
nearest = [np.sqrt(((row[:, None] - known[None]) ** 2).sum(-1)).min(1).mean() for row in rows]
print("distance to the nearest digit:", np.round(nearest, 2))
assert to_mean < 1e-9
assert nearest[-1] < 0.05 < nearest[0]

# %% [markdown]
# **What to remember.**
#
# - Pictures fill a thin, curved part of the space of pixels.
# - A network trained on squared error answers with a mean. In one step that mean is a blur.
# - Many small steps turn a sequence of means into one picture.
#
# The best denoiser of a *finite* set only repeats it: every picture above is a copy of a known digit. A network cannot
# remember everything, so it draws new pictures. [Lesson 5](5-digits.md) trains one.
