# %% [markdown]
# # 8. CLIP: two towers and one space
#
# **Question.** How does a picture model understand words?
#
# CLIP trains two networks together: one reads a caption, one sees a picture, and both return a unit vector. Training
# pulls a picture and its caption together and pushes all other pairs of the batch apart.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch

from latentdiff import LatentDiffusionPipeline
from latentdiff.core.images import to_images
from latentdiff.data.scenes import render, scene
from latentdiff.families.clip import load_own_scorer

pipe = LatentDiffusionPipeline.from_pretrained("scenes-64", runtime="torch", device="cpu")
clip = load_own_scorer(pipe.card.folder)
scenes = [scene(np.random.default_rng([3, number])) for number in range(100)]
pictures, captions = np.stack([render(each) for each in scenes]), [each.caption for each in scenes]

# %% [markdown]
# ## A similarity matrix
#
# Eight captions beside eight pictures. The diagonal should win.

# %%
with torch.no_grad():
    texts, images = clip.texts(captions), clip.images(to_images(pictures))
matrix = (texts @ images.T).numpy()
figure, axes = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(1, 1.1))
axes[0].imshow(np.concatenate([np.concatenate(pictures[k : k + 4], 1) for k in (0, 4)]))
axes[0].set_axis_off()
shown = axes[1].imshow(matrix[:8, :8], cmap="viridis")
axes[1].set(yticks=range(8), xlabel="picture")
axes[1].set_yticklabels(captions[:8], fontsize=7)
figure.colorbar(shown)
top1 = (matrix.argmax(0) == np.arange(100)).mean()
print(f"of 100 captions the right one is first for {top1:.2f} of the pictures (chance: 0.01)")
assert top1 > 0.6

# %% [markdown]
# ## The loss
#
# Each row and each column of the matrix is a classification with as many classes as the batch has pairs. A learnt
# scale, one over the temperature, sharpens it.

# %%
logit_scale = clip.clip.towers.logit_scale.exp().item()
logits = torch.tensor(matrix[:64, :64]) * logit_scale
target = torch.arange(64)
loss = (torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)) / 2
print(f"logit scale {logit_scale:.1f}; loss {loss:.2f} on 64 unseen pairs, {np.log(64):.2f} by guessing")
assert loss < 0.5 * np.log(64)

# %% [markdown]
# ## Does it know order?
#
# Words alone are not enough: "a red circle above a blue square" and "a blue square above a red circle" have the same ones.

# %%
one, other = "a red circle above a blue square", "a blue square above a red circle"
right = 0
for seed in range(6):
    drawn = pipe(one, seed=seed, output_type="pt").images * 2 - 1
    with torch.no_grad():
        scores = (clip.texts([one, other]) @ clip.images(drawn).T)[:, 0]
    right += int(scores[0] > scores[1])
print(f"the right order wins on {right} of 6 drawn pictures")
assert right >= 5

# %% [markdown]
# This CLIP was trained on batches in which half of the pictures are *twins* of the other half, different in one fact. It
# has to read the order.
#
# ## Guiding with its gradient
#
# CLIP can also steer: at each step, move the guess of the clean picture in the direction that raises its score.

# %%
plain, steered = (
    pipe(
        "a cyan star", seed=3, num_images_per_prompt=4, guidance_scale=1.0, clip_guidance_scale=scale, output_type="pt"
    ).images
    for scale in (0.0, 8.0)
)
with torch.no_grad():
    before, after = (clip.score(["a cyan star"] * 4, images * 2 - 1).mean().item() for images in (plain, steered))
print(f"CLIP's score without {before:.3f}, with its gradient {after:.3f}")
assert after > before
figure, axes = plt.subplots(2, 4, figsize=(6, 3.1))
for row, images in enumerate((plain, steered)):
    for axis, picture in zip(axes[row], images, strict=True):
        axis.imshow(picture.permute(1, 2, 0))
        axis.set(xticks=[], yticks=[])
    axes[row, 0].set_ylabel(("without", "with")[row], fontsize=8)

# %% [markdown]
# **What to remember.**
#
# - CLIP puts texts and pictures into one space. The U-Net reads the text tower's vectors by cross-attention.
# - A score measured by a CLIP says what *that* CLIP knows. Optimising it too hard fools it.
#
# Try it: `latentdiff generate "a cyan star" -m scenes-64 --clip-guidance-scale 3`.
