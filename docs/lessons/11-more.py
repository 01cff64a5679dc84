# %% [markdown]
# # 11. Beyond text to picture
#
# **Question.** One trained denoiser, many uses: what else can it do without more training?

# %%
import matplotlib.pyplot as plt
import numpy as np

from latentdiff import LatentDiffusionPipeline

pipe = LatentDiffusionPipeline.from_pretrained("scenes-64")
photo = pipe("a red circle above a blue square", seed=1).images[0]


def show(pictures, titles):
    figure, axes = plt.subplots(1, len(pictures), figsize=(1.5 * len(pictures), 1.9))
    for axis, picture, title in zip(axes, pictures, titles, strict=True):
        axis.imshow(picture)
        axis.set(xticks=[], yticks=[])
        axis.set_title(title, fontsize=8)


# %% [markdown]
# ## Picture to picture
#
# Start from a noisy *picture* instead of noise (SDEdit, Meng et al. 2022). `strength` is the share of the steps that
# are made: a small one keeps the picture, 1 ignores it.

# %%
strengths = (0.2, 0.4, 0.6, 0.8, 1.0)
changed = [pipe("two pink rings", image=photo, strength=s, seed=2).images[0] for s in strengths]
show([photo, *changed], ["given", *(f"strength {s}" for s in strengths)])
distance = [np.abs(np.asarray(photo).astype(int) - np.asarray(each)).mean() for each in changed]
print("mean distance from the given picture:", np.round(distance, 1))
assert distance[0] < distance[4]

# %% [markdown]
# ## Masks
#
# At every step, put the known part back at the current noise level, and let the network fill in the rest. Describe the
# whole picture: the network sees all of it.

# %%
mask = np.zeros((64, 64), np.uint8)
mask[:34] = 255  # white is redrawn
filled = [pipe("a yellow star above a blue square", image=photo, mask_image=mask, seed=s).images[0] for s in (1, 2, 3)]
show([photo, mask, *filled], ["given", "mask", "seed 1", "seed 2", "seed 3"])
for each in filled:
    assert np.array_equal(np.asarray(each)[40:], np.asarray(photo)[40:])  # black keeps its bits

# %% [markdown]
# ## Two passes
#
# Draw small, enlarge, add a little noise, draw again. The first pass decides what is where, the second the detail.

# %%
larger = pipe("a large orange square", seed=1, hires_scale=1.5, hires_strength=0.3).images[0]
show([pipe("a large orange square", seed=1).images[0], larger], ["one pass, 64 px", f"two passes, {larger.width} px"])
assert larger.size == (96, 96)

# %% [markdown]
# ## Between two noises
#
# Noises lie close to a sphere. Walking along the arc between two of them changes a picture smoothly.

# %%
shares = (0.0, 0.25, 0.5, 0.75, 1.0)
between = [pipe("two green stars", seed=5, variation_seed=6, variation_strength=share).images[0] for share in shares]
show(between, [f"share {share:g}" for share in shares])
assert np.array_equal(between[-1], pipe("two green stars", seed=6).images[0])

# %% [markdown]
# ## Where to go from here
#
# | you want | guide |
# |---|---|
# | a new style or subject from your own pictures | [Fine-tuning](../guides/finetuning.md) |
# | a model of your own from nothing | [Training](../guides/training.md) |
# | to know how good it is | [Measuring](../guides/evaluating.md) |
# | more speed | [Speed and memory](../guides/speed.md) |
