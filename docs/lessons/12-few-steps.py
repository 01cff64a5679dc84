# %% [markdown]
# # 12. Few steps: how a model learns to jump
#
# **Question.** A sampler takes twenty steps because each step must be small. Can a network learn where the trajectory
# ends, and jump there?
#
# In one dimension the end is known exactly, so we can see what a jump should be. The data: a number near -1 in 30%
# of all cases, near +1 in the rest.

# %%
import time
from statistics import NormalDist

import matplotlib.pyplot as plt
import numpy as np
import torch

from latentdiff.diffusion.easy_consistency import EasyConsistencyLoss
from latentdiff.diffusion.mean_flow import MeanFlowLoss
from latentdiff.diffusion.path import Straight
from latentdiff.networks.conditions import Conditions

SHARES, CENTRES, WIDTH = np.array([0.3, 0.7]), np.array([-1.0, 1.0]), 0.15
path = Straight()


def velocity(x, t):
    """E[noise - x0 | x_t], exactly, on the straight path x_t = (1 - t) x0 + t noise."""
    spread = ((1 - t) * WIDTH) ** 2 + t**2
    logs = np.log(SHARES) - (x[:, None] - (1 - t) * CENTRES) ** 2 / (2 * spread)
    weights = np.exp(logs - logs.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    away = x[:, None] - (1 - t) * CENTRES
    each = t / spread * away - CENTRES - (1 - t) * WIDTH**2 / spread * away
    return (weights * each).sum(1)


def euler(x, steps):
    """Euler's method along the exact velocity, from t = 1 to 0."""
    grid = np.linspace(1, 0, steps + 1)
    for t, r in zip(grid[:-1], grid[1:], strict=True):
        x = x + (r - t) * velocity(x, t)
    return x


noise = np.random.default_rng(0).standard_normal(4000)

# %% [markdown]
# ## Why one step fails
#
# At pure noise the best guess of x_0 is the mean of all data, whatever the noise. One step goes there, so every picture is
# the same gray.

# %%
for steps in (1, 2, 4, 8, 64, 500):
    ends = euler(noise, steps)
    print(f"{steps:3} steps: {(ends > 0).mean():.3f} of the ends above 0, deviation {ends.std():.3f}")
mean = (SHARES * CENTRES).sum()
assert np.abs(euler(noise, 1) - mean).max() < 0.05, "one step ends at the mean"
assert abs((euler(noise, 500) > 0).mean() - 0.7) < 0.02

# %% [markdown]
# ## Where each trajectory ends
#
# Trajectories never cross, so they keep their order: the lowest 30% of the noise must end near -1. So the map from
# noise to data is a **quantile map**. A network that knows this map draws in one step.

# %%
grid = np.linspace(-4, 4, 4001)
of_data = sum(
    share * np.array([NormalDist(centre, WIDTH).cdf(value) for value in grid])
    for share, centre in zip(SHARES, CENTRES, strict=True)
)


def exact(x):
    """The end of the trajectory from x at t = 1."""
    return np.interp([NormalDist().cdf(value) for value in x], of_data, grid)


apart = np.abs(np.sort(euler(noise, 500)) - np.sort(exact(noise)))
print(f"500 Euler steps end {np.median(apart):.4f} from it (median)")
assert np.median(apart) < 0.01

# %% [markdown]
# ## Two ways to learn the jump
#
# We do not have the map, only data. Two networks, the students, learn from data alone:
#
# **Consistency** (Song et al. 2023; easy consistency tuning, Geng et al. 2024). f(x_t, t) is the end of the trajectory
# from x_t. All points of a trajectory have the same end. So take x_t and, with the same noise, a slightly less noisy
# x_s, on average the next point of the trajectory. Pull f(x_t, t) towards f(x_s, s). At s = 0 the end is the data.
#
# **Mean flow** (Geng et al. 2025). u(x_t, r, t) is the average velocity from t to r. A formula connects it with the
# velocity v = noise - x_0, which the data give directly (du/dt is the derivative along the trajectory):
#
#     u  =  v - (t - r) du/dt
#
# `latentdiff finetune --method consistency` can train with either loss.

# %%


def network(inputs):
    sizes = (inputs, 96, 96, 96, 1)
    layers = [torch.nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True)]
    return torch.nn.Sequential(*[part for layer in layers for part in (layer, torch.nn.SiLU())][:-1])


def trained(loss, net, student, rows, steps=4000):
    """Train on fresh data; returns the seconds it took."""
    began, draw = time.perf_counter(), np.random.default_rng(1)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    lr_schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        chosen = draw.choice(2, 512, p=SHARES)
        x0 = torch.tensor(CENTRES[chosen] + WIDTH * draw.standard_normal(512)).float()[:, None]
        pairs = rows[torch.from_numpy(draw.integers(len(rows), size=512))]
        fresh = torch.tensor(draw.standard_normal((512, 1))).float()
        value = loss(student, None, x0, fresh, pairs, Conditions({}), None).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        lr_schedule.step()
    return time.perf_counter() - began


torch.manual_seed(0)
jumping, averaging = network(2), network(3)


def consistent(x, time, conditions):
    return jumping(torch.cat([x, time[:, None] / 1000], 1))


def average(x, time, conditions):
    return averaging(torch.cat([x, time[:, None] / 1000, conditions["until"][:, None] / 1000], 1))


rng = np.random.default_rng(2)
consistency = EasyConsistencyLoss(path, "flow", shrink=128, guidance=1.0, huber=0.1)
rows = torch.stack([consistency.rows(t) for t in np.linspace(1, 1000, 1000)])
print(f"consistency: {trained(consistency, jumping, consistent, rows):.0f} s")
flow = MeanFlowLoss(path, guidance=1.0, power=0.0)  # the weight of a sample suits pictures, not single numbers
rows = torch.stack([flow.rows(t, rng) for t in rng.uniform(1, 1000, 20_000)])
print(f"mean flow: {trained(flow, averaging, average, rows):.0f} s")

# %% [markdown]
# One step of each, beside the exact map:


# %%
@torch.no_grad()
def one_step(student):
    x, ends = torch.tensor(noise).float()[:, None], Conditions({"until": torch.zeros(len(noise))})
    return (x - student(x, torch.full((len(noise),), 1000.0), ends)).flatten().numpy()


exact_ends = exact(noise)
drawn = {"consistency": one_step(consistent), "mean flow": one_step(average)}
figure, axes = plt.subplots(1, 2, figsize=(10, 3.8))
order = np.argsort(noise)
axes[0].plot(noise[order], exact_ends[order], "k", label="exact")
axes[0].axhline(mean, color="gray", linestyle=":", label="one Euler step")
for name, ends in drawn.items():
    axes[0].plot(noise[order], ends[order], label=name, linewidth=1)
    axes[1].hist(ends, 60, range=(-1.6, 1.6), alpha=0.5, label=name)
    above = (ends > 0).mean()
    print(f"{name}: {above:.3f} above 0, deviation {ends.std():.3f} (exact: {exact_ends.std():.3f})")
    assert abs(above - 0.7) < 0.06
    assert abs(ends.std() - exact_ends.std()) < 0.12
axes[0].set(xlabel="noise", ylabel="the end")
axes[0].legend(frameon=False)
axes[1].set(xlabel="one step draws")
axes[1].legend(frameon=False)

# %% [markdown]
# The jump is steep between the two ends: a small network rounds it off, and some ends lie between -1 and +1. Those are the
# soft edges and the mixed shapes of one-step pictures. Two or four steps mend most of it, since a second jump starts from
# less noise, where the map is easier.

# %% [markdown]
# **What to remember.**
#
# - One step along the velocity ends at the mean of the data. That is why plain samplers need many.
# - Each noise has its own end. A consistency model learns the ends, a mean flow the average velocity to them.
# - Both learn from data alone, and guidance can be built in: then a picture takes 1 to 8 evaluations instead of 40.
#
# Try it: `latentdiff generate "a red circle" -m scenes-64 --fast`, and [Few steps](../guides/finetuning.md#few-steps).
