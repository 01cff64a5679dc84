# %% [markdown]
# # 6. The U-Net: what each part does, by switching it off
#
# **Question.** A U-Net has a time input, skip connections, self-attention and cross-attention. What is each one for?
#
# We take the trained model `scenes-64`, remove one part at a time, and draw the same picture. What goes wrong shows what
# the part does.

# %%
from contextlib import contextmanager

import matplotlib.pyplot as plt
import numpy as np
import torch

from latentdiff import LatentDiffusionPipeline

pipe = LatentDiffusionPipeline.from_pretrained("scenes-64", runtime="torch", device="cpu")
unet = pipe.model.backbone.model
PROMPT, ASKED = "a red circle above a blue square", {"seed": 1, "num_images_per_prompt": 4, "output_type": "uint8"}
for name in ("down_blocks", "mid_block", "up_blocks"):
    print(f"{name:12} {sum(p.numel() for p in getattr(unet, name).parameters()):>9,} parameters")

# %% [markdown]
# ## Switches
#
# Every switch replaces the output of some layers by zeros, and restores it afterwards.


# %%
@contextmanager
def silent(layers):
    """A block in which these layers return zeros."""
    handles = [layer.register_forward_hook(lambda module, given, output: torch.zeros_like(output)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def without_skips():
    """A block in which the upward half gets zeros in place of the downward half's features."""

    def cut(module, args, kwargs):
        skips = kwargs.get("res_hidden_states_tuple")
        if skips is not None:
            kwargs["res_hidden_states_tuple"] = tuple(torch.zeros_like(skip) for skip in skips)
        return args, kwargs

    handles = [block.register_forward_pre_hook(cut, with_kwargs=True) for block in unet.up_blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def attention(kind):
    return [module.to_out[0] for name, module in unet.named_modules() if name.endswith(f".{kind}")]


switches = {
    "everything": silent([]),
    "no time": silent([unet.time_embedding]),
    "no skips": without_skips(),
    "no self-attention": silent(attention("attn1")),
    "no cross-attention": silent(attention("attn2")),
}
drawn = {}
for name, switch in switches.items():
    with switch:
        drawn[name] = pipe(PROMPT, **ASKED).images
figure, axes = plt.subplots(len(drawn), 4, figsize=(5, 6.2))
for row, (name, pictures) in enumerate(drawn.items()):
    for axis, picture in zip(axes[row], pictures, strict=True):
        axis.imshow(picture)
        axis.set(xticks=[], yticks=[])
    axes[row, 0].set_ylabel(name, fontsize=8, rotation=0, ha="right")

# %%
whole = drawn["everything"].astype(int)
for name, pictures in drawn.items():
    print(f"{name:20} mean difference {np.abs(pictures - whole).mean():5.1f} of 255")
assert np.abs(drawn["no skips"] - whole).mean() > np.abs(drawn["no self-attention"] - whole).mean()
assert np.array_equal(pipe(PROMPT, **ASKED).images, drawn["everything"])  # every layer is back

# %% [markdown]
# - **Time** tells the network how much of its input is noise. Without it the network cannot scale its answer.
# - **Skip connections** carry the exact places of edges past the coarse middle. Without them the network, which was
#   trained with them, has no noise to subtract.
# - **Self-attention** lets distant places agree on what is where.
# - **Cross-attention** reads the words. This model also adds the pooled text to the time, so some of the prompt survives.
#
# ## When do the words matter?
#
# We remove cross-attention only while the noise is high, or only while it is low.

# %%
steps = list(pipe.stream(PROMPT, seed=1))
figure, axes = plt.subplots(1, 3, figsize=(6, 2.3))
for axis, (name, chosen) in zip(
    axes, {"all steps": (0, 20), "first 10 steps": (0, 10), "last 10 steps": (10, 20)}.items(), strict=True
):
    walk = pipe.stream(PROMPT, seed=1)
    for number in range(len(steps)):
        with silent([] if chosen[0] <= number < chosen[1] else attention("attn2")):
            last = next(walk)
    axis.imshow((pipe.decode(last.x)[0].permute(1, 2, 0).clip(-1, 1) + 1) / 2)
    axis.set(xticks=[], yticks=[], title=f"words in {name}")
    axis.title.set_fontsize(8)

# %% [markdown]
# With words in the first half alone, the things are in their places, but their shapes are not exact. With words in the
# second half alone, the shapes are exact, but the things are others and elsewhere than with all words. So words act at
# all steps, on different things. [Lesson 9](9-guidance.md) limits guidance to some of them.
#
# **What to remember.** A part can be studied by silencing it. But a network that was *trained* without a part would make
# up for some of it: this shows what this network relies on, not what any network needs.
#
# Try it: `latentdiff show attention "a red circle above a blue square" -m scenes-64`.
