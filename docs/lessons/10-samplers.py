# %% [markdown]
# # 10. Samplers: the same trajectory in fewer steps
#
# **Question.** DDPM, DDIM, Euler, DPM++, UniPC, "a", "SDE": what do they have in common, and which one should I take?
#
# All of them walk from noise to data with the same denoiser. An **ODE** sampler adds no noise on the way: its
# trajectory is smooth, and the end depends on the start alone. An **SDE** sampler adds fresh noise at every step.

# %%
import matplotlib.pyplot as plt
import numpy as np

from latentdiff.diffusion.path import VariancePreserving
from latentdiff.diffusion.samplers import SAMPLERS

path = VariancePreserving.scaled_linear()
points = np.array([[np.cos(a), np.sin(a)] for a in np.arange(5) * 2 * np.pi / 5])
WIDTH = 0.1


def best(x, level):
    """The exact denoiser of five Gaussians on a circle."""
    variance = (level.alpha * WIDTH) ** 2 + level.sigma**2
    exponents = -((x[:, None] - level.alpha * points[None]) ** 2).sum(-1) / (2 * variance)
    weights = np.exp(exponents - exponents.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    gain = level.alpha * WIDTH**2 / variance
    return (weights[..., None] * (points[None] + gain * (x[:, None] - level.alpha * points[None]))).sum(1)


def walk(name, start, steps, seed=0):
    rng = np.random.default_rng(seed)
    levels = path.levels(steps, "trailing")
    walked = SAMPLERS[name].walk(best, start, levels, lambda number: rng.standard_normal(start.shape), path)
    return np.stack([start, *(step.x for step in walked)])


start = np.random.default_rng(1).standard_normal((12, 2))
figure, axes = plt.subplots(1, 3, figsize=(10, 3.5), sharey=True)
for axis, name in zip(axes, ("ddim", "ddpm", "dpmpp_2m_sde"), strict=True):
    trace = walk(name, start, 200)
    axis.plot(trace[..., 0], trace[..., 1], linewidth=0.7)
    axis.plot(*points.T, "k*")
    axis.set(title=f"{name}", aspect="equal", xlim=(-3, 3), ylim=(-3, 3))

# %% [markdown]
# ## The order of a sampler
#
# An ODE sampler makes an error at each step. Its **order** says how the error falls when the number of steps doubles:
# order 1 divides it by 2, order 2 by 4, order 3 by 8. Data is one Gaussian of deviation s here. On the exact trajectory
# x / sqrt((alpha s)^2 + sigma^2) stays the same all the way. We stop at the last noisy level, since the step to no noise at
# all has an error of its own.

# %%
WIDE = 0.6


def gaussian(x, level):
    return level.alpha * WIDE**2 / ((level.alpha * WIDE) ** 2 + level.sigma**2) * x


many = np.random.default_rng(2).standard_normal((500, 2))


def end(name, steps):
    *_, last = SAMPLERS[name].walk(gaussian, many, path.levels(steps + 1, "exponential")[:-1], path=path)
    return last.x


def deviation(level):
    return np.sqrt((level.alpha * WIDE) ** 2 + level.sigma**2)


first, *_, lowest, _ = path.levels(10, "exponential")
exact = many * deviation(lowest) / deviation(first)
counts = np.array([10, 20, 40, 80])
figure, axis = plt.subplots(figsize=(6, 4))
orders = {}
for name in ("ddim", "euler", "dpmpp_2m", "unipc", "heun"):
    errors = np.array([np.sqrt(((end(name, steps) - exact) ** 2).mean()) for steps in counts])
    evaluations = counts * (2 if name == "heun" else 1)
    axis.plot(evaluations, errors, "o-", label=name)
    orders[name] = float(np.log2(errors[-2] / errors[-1]))
axis.set(xscale="log", yscale="log", xlabel="evaluations of the network", ylabel="error")
axis.legend(frameon=False)
for name, order in orders.items():
    print(f"{name:9} order {order:.2f}")
assert abs(orders["ddim"] - 1) < 0.2
assert orders["dpmpp_2m"] > 1.6
assert orders["unipc"] > 1.6

# %% [markdown]
# Multistep samplers (DPM++ 2M, UniPC) remember earlier guesses of x_0 and reach a higher order with **one** evaluation a
# step. Heun evaluates twice. `euler` is `ddim` in other variables, so their lines coincide.
#
# ## What noise on the way does
#
# The same 2,000 starts twice, with different noise on the way. How many end at the same star?


# %%
def star(x):
    return ((x[:, None] - points[None]) ** 2).sum(-1).argmin(1)


cloud = np.random.default_rng(3).standard_normal((2000, 2))
for name in ("ddim", "ddpm", "dpmpp_2m_sde"):
    ends = [star(walk(name, cloud, 100, seed)[-1]) for seed in (0, 1)]
    same = (ends[0] == ends[1]).mean()
    print(
        f"{name:16} {same:.2f} end at the same star; the fullest star has {np.bincount(ends[0]).max() / 2000:.3f} of all"
    )
    assert same == 1 if name == "ddim" else same < 0.9

# %% [markdown]
# Each star gets a fifth, whatever the sampler: all of them draw from the same distribution. But only an ODE sampler makes
# the picture a function of its first noise alone. With an SDE sampler it changes with the number of steps too.
#
# **Which one?**
#
# | you want | take |
# |---|---|
# | few steps (6 to 15), close to the picture of many | `unipc` or `dpmpp_2m` |
# | to invert a picture, or compare models | `ddim`, `heun` |
# | variety, many steps | `euler_ancestral`, `dpmpp_2m_sde`, `ddpm` |
#
# Try it: `latentdiff show samplers "two blue rings" -m scenes-64`.
