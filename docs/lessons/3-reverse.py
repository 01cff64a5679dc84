# %% [markdown]
# # 3. The reverse process: Bayes' rule, one step back
#
# **Question.** A step of noise is easy. How does a model go back, and what does its network have to predict?
#
# Bayes' rule turns the forward step around *if we know the clean picture* x_0:
#
#     q(x_s | x_t, x_0)  =  q(x_t | x_s) q(x_s | x_0) / q(x_t | x_0),     s < t
#
# All three on the right are Gaussian, so the left one is too. Its mean is a weighted sum of x_t and x_0.

# %%
import matplotlib.pyplot as plt
import numpy as np

from latentdiff.diffusion.parametrization import PARAMETRIZATIONS, denoiser, target
from latentdiff.diffusion.path import VariancePreserving
from latentdiff.diffusion.process import diffuse, diffuse_step, posterior_mean, transition
from latentdiff.diffusion.samplers import ddpm

rng = np.random.default_rng(0)
path = VariancePreserving.linear()

# %% [markdown]
# We check the formula without using it: draw many x_0 -> x_s -> x_t, keep the walks that end near one value of x_t, and
# look where they were at s.

# %%
s, t, x0, seen = path.level(300), path.level(400), 0.7, 0.2
x_s = diffuse(x0, rng.standard_normal(2_000_000), s)
x_t = diffuse_step(x_s, rng.standard_normal(x_s.shape), s, t)
kept = x_s[np.abs(x_t - seen) < 0.01]
print(f"{len(kept):,} walks: mean {kept.mean():.4f}, deviation {kept.std():.4f}")
print(f"formula:      mean {posterior_mean(seen, x0, s, t):.4f}, deviation {transition(s, t).variance ** 0.5:.4f}")
assert abs(kept.mean() - posterior_mean(seen, x0, s, t)) < 0.01
assert abs(kept.std() / transition(s, t).variance ** 0.5 - 1) < 0.03

# %% [markdown]
# Sampling does not know x_0. So a network **guesses** it from x_t, and the step uses the guess. This is the whole of
# DDPM's ancestral sampling:
#
#     x_s  =  posterior_mean(x_t, guess of x_0)  +  sqrt(variance) noise
#
# ## What the network predicts
#
# One equation connects x_t, x_0 and the noise: x_t = alpha x_0 + sigma noise. So a prediction of x_0, of the noise or
# of a mixture holds the same information. The choices differ in how errors are weighted, and in where they break.
#
# | name | predicts | at little noise | at pure noise |
# |---|---|---|---|
# | `epsilon` | the noise | fine | says nothing of x_0 |
# | `sample` | x_0 | must copy its input exactly | fine |
# | `v_prediction` | alpha noise - sigma x_0 | like epsilon | like x_0 |
# | `flow` | noise - x_0, the velocity along a straight line | like epsilon | like x_0 |
# | `karras` | a mixture of both, of unit variance | like epsilon | like x_0 |

# %%
x0, noise, level = rng.standard_normal(5), rng.standard_normal(5), path.level(500)
x_t = diffuse(x0, noise, level)
for name in PARAMETRIZATIONS:
    a, b = target(name, level)
    output = a * noise + b * x0  # what a perfect network of this kind returns
    back = denoiser(lambda *_, answer=output: answer, name, None)(x_t, level)
    print(f"{name:13} target {a:+.3f} noise {b:+.3f} x0; back to x0 within {np.abs(back - x0).max():.0e}")
    assert np.allclose(back, x0)

# %% [markdown]
# How much does an error of 0.1 in the output move the guess of x_0? For epsilon it grows without bound towards pure
# noise; v never amplifies it.

# %%
figure, axis = plt.subplots(figsize=(6, 3.5))
times = np.arange(0, 1000, 5)
for name in ("epsilon", "sample", "v_prediction", "flow"):
    axis.plot(times, [0.1 * abs(PARAMETRIZATIONS[name](path.level(float(t))).out) for t in times], label=name)
axis.set(xlabel="t", ylabel="error of x0 for an error of 0.1", yscale="log")
axis.legend(frameon=False)

# %% [markdown]
# ## Walks of one pixel
#
# Data: a pixel that is -1 in 30% of all pictures and +1 in the rest. The best guess of x_0 is known in closed form,
# so no training is needed.

# %%
share = 0.7


def best_guess(x, level):
    """E[x0 | x_t] for x0 = +1 with probability `share`, else -1."""
    log_odds = np.log(share / (1 - share)) + 2 * level.alpha * x / level.sigma**2
    return np.tanh(log_odds / 2)


walks = rng.standard_normal(2000)
levels = path.levels(200, "trailing")
steps = list(ddpm(best_guess, walks, levels, lambda number: rng.standard_normal(walks.shape)))
trace = np.stack([step.x[:40] for step in steps])
figure, axis = plt.subplots(figsize=(7, 3.5))
axis.plot([step.level.t for step in steps], trace, linewidth=0.5, alpha=0.7)
axis.set(xlabel="t", ylabel="the pixel", xlim=(999, -1))
end = steps[-1].x
print(f"{(end > 0).mean():.3f} of the walks end at +1; the data has {share}")
print(f"the farthest end is {np.abs(np.abs(end) - 1).max():.3f} from +1 or -1")
assert abs((end > 0).mean() - share) < 4 * np.sqrt(share * (1 - share) / 2000)

# %% [markdown]
# Every walk starts undecided. Most decide around t = 260, where signal and noise are equal.
#
# **What to remember.**
#
# - Given x_0, the step back is a Gaussian around a weighted sum of x_t and x_0. The network only supplies x_0.
# - epsilon, x_0, v and flow hold the same information. Convert it to x_0 once, and a sampler needs only that.
# - Sampling reproduces the *shares* of the data, not only its values.
#
# Try it: `latentdiff show reverse "a red circle" -m scenes-64`.
