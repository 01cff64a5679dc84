# %% [markdown]
# # 5. Training and sampling on small data
#
# **Question.** What does a whole diffusion model look like, from data to samples, without any library of models?
#
# It is short: a network, one loss, one loop, one sampler. We train on scikit-learn's digits, 8 x 8 pixels, with class
# labels, in about half a minute.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import nn

from latentdiff.diffusion import guidance
from latentdiff.diffusion.objective import DiffusionLoss
from latentdiff.diffusion.parametrization import denoiser
from latentdiff.diffusion.path import VariancePreserving
from latentdiff.diffusion.samplers import SAMPLERS

torch.manual_seed(0)
torch.set_num_threads(1)  # layers this small gain nothing from more
loaded = load_digits()
pictures = torch.tensor(loaded.data / 8 - 1, dtype=torch.float32)
labels = torch.tensor(loaded.target)
NONE = 10  # the label of "any digit", for guidance

# %% [markdown]
# ## The network
#
# Five linear layers turn the noisy picture into v. The time and the label become vectors that are added before each
# of the middle three.


# %%
class Network(nn.Module):
    """(x_t, t, label) -> the predicted v; x_t (B, 64)."""

    def __init__(self, width=256):
        super().__init__()
        self.first, self.last = nn.Linear(64, width), nn.Linear(width, 64)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.label = nn.Embedding(11, width)
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x, t, label):
        waves = torch.as_tensor(t, dtype=torch.float32).reshape(-1, 1) * 10.0 ** -torch.linspace(0, 4, 32)
        condition = self.time(torch.cat([waves.sin(), waves.cos()], -1)) + self.label(label)
        h = self.first(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            h = h + torch.nn.functional.silu(layer(norm(h) + condition))
        return self.last(h)


network = Network()
print(f"{sum(p.numel() for p in network.parameters()):,} parameters")

# %% [markdown]
# ## The loop
#
# Draw pictures, times and noise; predict; step. One label in ten is hidden, so the network also learns the digits without
# a label. The network predicts v, since the noise alone says nothing of the picture at the last times
# ([lesson 3](3-reverse.md)).

# %%
path = VariancePreserving.cosine()
loss_of = DiffusionLoss(path, "v_prediction")
STEPS, BATCH = 2500, 128
optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.01)
lr_schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, STEPS, pct_start=0.05)
average = torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998))
history = []
for step in range(STEPS):
    rows = torch.randint(len(pictures), (BATCH,))
    hidden = torch.where(torch.rand(BATCH) < 0.1, NONE, labels[rows])
    noise, t = torch.randn(BATCH, 64), torch.randint(path.T, (BATCH,))
    loss = loss_of(network, pictures[rows], noise, t, hidden).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    lr_schedule.step()
    average.update_parameters(network)
    history.append(float(loss.detach()))
smooth = np.convolve(history, np.ones(50) / 50, "valid")
figure, axis = plt.subplots(figsize=(6, 3))
axis.plot(smooth)
axis.set(xlabel="step", ylabel="loss", yscale="log")
print(f"loss {np.mean(history[:50]):.3f} -> {np.mean(history[-200:]):.3f}")
assert np.mean(history[-200:]) < 0.3

# %% [markdown]
# ## From noise to digits
#
# A column is a label. Guidance pushes away from "any digit" and towards the label; [lesson 9](9-guidance.md) says how.


# %%
@torch.no_grad()
def draw(label, steps=50, scale=1.5, sampler="ddim"):
    """Pictures (N, 64) of labels (N,), by classifier-free guidance."""
    model = average.module.eval()
    cond = denoiser(model, "v_prediction", label)
    uncond = denoiser(model, "v_prediction", torch.full_like(label, NONE))
    guided = guidance.classifier_free(guidance.paired(uncond, cond), scale)
    noise = torch.randn(len(label), 64, generator=torch.Generator().manual_seed(1))
    *_, last = SAMPLERS[sampler].walk(
        guided, noise, path.levels(steps, "trailing"), lambda n: torch.randn(noise.shape), path
    )
    return last.x.numpy()


drawn = draw(torch.arange(10).repeat(5))
figure, axes = plt.subplots(5, 10, figsize=(8, 4.2))
for axis, picture in zip(axes.flat, drawn, strict=True):
    axis.imshow(picture.reshape(8, 8), cmap="gray", vmin=-1, vmax=1)
    axis.set_axis_off()

# %% [markdown]
# ## Are they right, and are they new?
#
# A classifier that knows only real digits reads the drawn ones. And we look for the nearest training picture: a model
# that copies has a distance near 0.

# %%
asked = torch.arange(10).repeat(30)
many = draw(asked)
reader = LogisticRegression(max_iter=2000).fit(loaded.data[::2], loaded.target[::2])
ceiling = reader.score(loaded.data[1::2], loaded.target[1::2])
right = (reader.predict((many + 1) * 8) == asked.numpy()).mean()
print(f"read right: {right:.3f} of drawn digits, {ceiling:.3f} of real ones that the reader has not seen")


def to_nearest(points, others):
    return np.sqrt(((points[:, None] - others[None]) ** 2).sum(-1)).min(1)


real = pictures.numpy()
print(
    f"distance to the nearest of half the digits: drawn {to_nearest(many, real[1::2]).mean():.2f}, "
    f"of the other half {to_nearest(real[::2], real[1::2]).mean():.2f}"
)
assert right > 0.85
assert to_nearest(many, real[1::2]).mean() > 0.3 * to_nearest(real[::2], real[1::2]).mean()

# %% [markdown]
# **What to remember.**
#
# - Training is supervised learning: inputs are noisy pictures, targets are their noise or, as here, v.
# - Sampling runs the network many times. Nothing else happens.
# - Check both sides: that samples show what was asked, and that they are not copies.
#
# Next: [what the parts of a U-Net do](6-unet.md). With pictures of your own: `latentdiff train configs/pictures-64.toml
# --data my-pictures`.
