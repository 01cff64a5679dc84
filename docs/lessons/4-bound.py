# %% [markdown]
# # 4. The bound: what training minimises
#
# **Question.** Training minimises the error of predicted noise. Why should that give a good model of the data?
#
# Because a weighted sum of those errors bounds the likelihood. For a walk x_0 -> x_1 -> ... -> x_T,
#
#     -log p(x_0)  <=  L_T  +  L_{T-1} + ... + L_1  +  L_0
#
# | term | says | with a Gaussian reverse step it is |
# |---|---|---|
# | L_T, *prior* | how far the noisiest x_T is from pure noise | the same for every network |
# | L_t, *denoising* | how far our step back is from Bayes' step, [lesson 3](3-reverse.md) | a weight times the squared error of x_0, plus a constant |
# | L_0, *reconstruction* | how likely x_0 is, given x at the first level | the same form |
#
# We compute it where the exact answer is known: data that is Gaussian with deviation s. Its best denoiser is linear, its
# smallest possible code length is its entropy, log(s sqrt(2 pi e)).

# %%
import matplotlib.pyplot as plt
import numpy as np

from latentdiff import LatentDiffusionPipeline
from latentdiff.data.scenes import render, scene
from latentdiff.diffusion.bound import Terms, errors_of, mean_and_error, prior
from latentdiff.diffusion.path import VariancePreserving
from latentdiff.evaluation.likelihood import likelihood

s = 0.5
entropy = np.log(s * np.sqrt(2 * np.pi * np.e))


def exact_terms(path):
    """(L_T, all L_t with L_0 first) of Gaussian data under its best denoiser, in nats."""
    a = path.alphas_cumprod
    error = s**2 * (1 - a) / (a * s**2 + 1 - a)  # of the best guess of x0
    terms = Terms.of(path)
    return prior(np.array([[s]]), path)[0], terms.weight * error + terms.constant


# %% [markdown]
# ## The gap closes with more steps


# %%
def evenly(steps):
    """A schedule whose angle rises evenly from little noise to nearly pure noise."""
    return VariancePreserving(np.cos(np.linspace(0.02, np.pi / 2 - 0.02, steps)) ** 2)


print(f"entropy {entropy:.4f} nats: no model can do better")
gaps = []
for steps in (10, 100, 1000, 10000):
    last, others = exact_terms(evenly(steps))
    gaps.append(last + others.sum() - entropy)
    print(
        f"{steps:6} steps: prior {last:.4f} + denoising {others[1:].sum():.4f} + reconstruction {others[0]:.4f}"
        f" = {last + others.sum():.4f}, {gaps[-1]:.4f} above the entropy"
    )
assert all(later < earlier for earlier, later in zip(gaps, gaps[1:]))
assert 0 < gaps[-1] < 0.01

# %% [markdown]
# The bound holds for any number of steps and becomes exact as steps become small. A poor denoiser
# pays for its errors.

# %%
path = VariancePreserving.scaled_linear()
a = path.alphas_cumprod


def guess(share):
    """A denoiser whose gain is wrong by that factor."""

    def predict(x, times):
        alpha2 = a[times][:, None]
        return share * np.sqrt(alpha2) * s**2 / (alpha2 * s**2 + 1 - alpha2) * x

    return predict


x0 = np.random.default_rng(0).normal(0, s, (2000, 1))
for share in (1.0, 0.95, 0.8):
    mean, error = mean_and_error(errors_of(guess(share), x0, path, count=8).total())
    print(f"gain times {share}: {mean:.3f} ± {error:.3f} nats")
best = errors_of(guess(1.0), x0, path, count=8).total()
last, others = exact_terms(path)
assert abs(best.mean() - last - others.sum()) < 4 * mean_and_error(best)[1]

# %% [markdown]
# ## A trained model, term by term
#
# `scenes-64` on scenes that it has never seen. Its latents have 1,024 dimensions, so terms are large. To code a
# *picture* there are two more terms: the decoder's, and what the random choice of latents gives back.

# %%
pipe = LatentDiffusionPipeline.from_pretrained("scenes-64", runtime="torch", device="cpu")
unseen = [scene(np.random.default_rng([7, number])) for number in range(12)]
result = likelihood(pipe.model, np.stack([render(each) for each in unseen]), [each.caption for each in unseen], times=8)
for name, errors in (("with captions", result.cond), ("without", result.uncond)):
    mean, error = mean_and_error(result.bits(errors))
    print(f"{name:14} {mean:.2f} ± {error:.2f} bits for each value of a picture (8 without a model)")
mean, error = mean_and_error(result.gain())
print(f"captions save  {mean:.4f} ± {error:.4f} bits on the same noise")
assert mean > 2 * error

# %%
edges = [1, 10, 30, 100, 300, 600, 1000]
middle = np.sqrt(np.array(edges[1:]) * np.array(edges[:-1]))
figure, axis = plt.subplots(figsize=(6, 3.5))
for name, errors in (("with captions", result.cond), ("without", result.uncond)):
    axis.plot(middle, errors.curve(edges), "o-", label=name)
axis.set(xscale="log", yscale="log", xlabel="t", ylabel="L_t, nats of a step")
axis.legend(frameon=False)

# %% [markdown]
# Most of the code length is paid at small t, for details that nobody sees. Ho et al. (2020) weigh all times equally
# instead (*L_simple*): worse as a code, better as a picture. `latentdiff show schedule` plots other weightings.
#
# **What to remember.**
#
# - The bound is a sum of squared errors of x_0 with known weights. It needs no sampling from the model.
# - For Gaussian data every term has a closed form. This package tests its bound against it.
# - Captions are worth a measurable number of bits: the model reads them.
#
# Try it: `latentdiff evaluate --only likelihood --pictures 200`.
