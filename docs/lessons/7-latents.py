# %% [markdown]
# # 7. Autoencoders and latents: why diffusion moved out of pixels
#
# **Question.** Stable Diffusion does not diffuse pixels. What is lost by going to latents, and what is gained?
#
# An autoencoder squeezes a picture through a narrow code and rebuilds it. We build three on scikit-learn's digits
# (64 values to a code of 8), then look at a real one.

# %%
import time

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from latentdiff import LatentDiffusionPipeline
from latentdiff.networks.conditions import stacked
from latentdiff.networks.encoders.prompt import Prompt

torch.manual_seed(0)
torch.set_num_threads(1)
digits = torch.tensor(load_digits().data / 8 - 1, dtype=torch.float32)
train, test = digits[:1500], digits[1500:]
CODE = 8


def layers(*widths):
    steps = [part for a, b in zip(widths, widths[1:]) for part in (nn.Linear(a, b), nn.SiLU())]
    return nn.Sequential(*steps[:-1])


def trained(loss_of, *modules, steps=1500):
    optimizer = torch.optim.AdamW([p for module in modules for p in module.parameters()], 2e-3)
    for _ in range(steps):
        loss = loss_of(train[torch.randint(len(train), (128,))])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# %% [markdown]
# ## Plain, denoising, variational
#
# - A **plain** autoencoder minimises the error of rebuilding.
# - A **denoising** one gets a noisy picture and must rebuild the clean one, as a diffusion model's network does.
# - A **variational** one (VAE) codes a picture as a Gaussian, and pays for how far that is from the standard normal. So
#   codes fill a known region, and a random code means something.

# %%
plain = layers(64, 128, CODE), layers(CODE, 128, 64)
trained(lambda x: ((plain[1](plain[0](x)) - x) ** 2).sum(1).mean(), *plain)

denoising = layers(64, 128, CODE), layers(CODE, 128, 64)
trained(lambda x: ((denoising[1](denoising[0](x + 0.5 * torch.randn_like(x))) - x) ** 2).sum(1).mean(), *denoising)

encoder, decoder = layers(64, 128, 2 * CODE), layers(CODE, 128, 64)


def bound(x, weight=0.5):
    """Error of rebuilding from a random code + weight * divergence from N(0, 1) (Kingma & Welling 2014)."""
    mean, log_variance = encoder(x).chunk(2, 1)
    code = mean + (log_variance / 2).exp() * torch.randn_like(mean)
    divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1)
    return (((decoder(code) - x) ** 2).sum(1) + weight * divergence).mean()


trained(bound, encoder, decoder)

# %%
with torch.no_grad():
    noisy = test + 0.5 * torch.randn_like(test)
    rebuilt = {
        "plain": plain[1](plain[0](test)),
        "plain, noisy input": plain[1](plain[0](noisy)),
        "denoising, noisy input": denoising[1](denoising[0](noisy)),
        "VAE": decoder(encoder(test)[:, :CODE]),
    }
    codes = {"plain": plain[0](test), "VAE": encoder(test)[:, :CODE]}
    random = {"plain": plain[1](torch.randn(10, CODE)), "VAE": decoder(torch.randn(10, CODE))}
errors = {name: float(((x - test) ** 2).mean()) for name, x in rebuilt.items()}
for name, error in errors.items():
    print(f"{name:24} mean squared error {error:.3f}")
for name, code in codes.items():
    print(f"codes of the {name:6} deviation {code.std():.2f}")
assert errors["denoising, noisy input"] < errors["plain, noisy input"]
figure, axes = plt.subplots(4, 10, figsize=(8, 3.6))
rows = {
    "picture": test[:10],
    "VAE": rebuilt["VAE"][:10],
    "plain, random code": random["plain"],
    "VAE, random code": random["VAE"],
}
for row, (name, pictures) in enumerate(rows.items()):
    for axis, picture in zip(axes[row], pictures, strict=True):
        axis.imshow(picture.reshape(8, 8), cmap="gray", vmin=-1, vmax=1)
        axis.set(xticks=[], yticks=[])
    axes[row, 0].set_ylabel(name, fontsize=7, rotation=0, ha="right")

# %% [markdown]
# From a random code the VAE draws something like a digit. Diffusion in latents does better: it *learns* which codes
# occur, instead of assuming N(0, 1). So the VAE of a latent diffusion model needs only a small weight on the
# divergence, and can spend its code on detail.
#
# ## A real one
#
# `scenes-64`'s autoencoder: 64 x 64 x 3 values become 16 x 16 x 4.

# %%
pipe = LatentDiffusionPipeline.from_pretrained("scenes-64", runtime="torch", device="cpu")
picture = np.asarray(pipe("two green stars", seed=1).images[0])
latents = pipe.encode(picture[None])
back = (pipe.decode(latents)[0].permute(1, 2, 0).numpy() + 1) * 127.5
error = np.sqrt(((back - picture) ** 2).mean())
print(f"{picture.size:,} values -> {latents.numel():,}: {picture.size / latents.numel():.0f} times fewer")
print(f"PSNR {20 * np.log10(255 / error):.1f} dB")
assert 20 * np.log10(255 / error) > 35

# %% [markdown]
# What is gained: the network runs on fewer places. Attention costs the *square* of their number.

# %%
unet = pipe.model.backbone
batch = stacked([pipe.model.encoder.encode(Prompt("two green stars"))])
seconds = {}
for side in (16, 64):
    x = torch.randn(1, 4, side, side)
    unet.predict(x, 500, batch)
    begun = time.perf_counter()
    for _ in range(3):
        unet.predict(x, 500, batch)
    seconds[side] = (time.perf_counter() - begun) / 3
print(f"a step on 16 x 16 latents takes {1000 * seconds[16]:.0f} ms, on 64 x 64 {1000 * seconds[64]:.0f} ms")
assert seconds[64] > 4 * seconds[16]

# %% [markdown]
# **What to remember.**
#
# - A diffusion model's network is a denoising autoencoder for all noise levels.
# - Latents keep what the eye sees and drop what it does not. The network works on a tenth of the values.
# - What the autoencoder cannot rebuild, the whole model cannot draw: its quality is the ceiling.
#
# Try it: `latentdiff show latents photo.png`.
