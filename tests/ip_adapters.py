"""Tiny IP-Adapters with random weights, in the files that people have, and a CLIP that reads their pictures."""

import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

SIDE, WIDTH, EMBEDDED = 32, 64, 48


def image_encoder(seed=3):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=WIDTH,
                intermediate_size=96,
                projection_dim=EMBEDDED,
                num_hidden_layers=3,
                num_attention_heads=2,
                image_size=SIDE,
                patch_size=8,
            )
        ).eval()


def _normal(generator, *shape):
    return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5


def _projection(kind, width, draw):
    if kind == "plain":
        sizes = {"proj.weight": (4 * width, EMBEDDED), "proj.bias": (4 * width,), "norm.weight": (width,)}
        return {f"{name}": draw(*shape) for name, shape in (sizes | {"norm.bias": (width,)}).items()}
    if kind == "full":
        sizes = {"proj.0.weight": (WIDTH, WIDTH), "proj.0.bias": (WIDTH,), "proj.2.weight": (width, WIDTH)}
        sizes |= {"proj.2.bias": (width,), "proj.3.weight": (width,), "proj.3.bias": (width,)}
        return {name: draw(*shape) for name, shape in sizes.items()}
    hidden, inner = 64, 128
    sizes = {"latents": (1, 6, hidden), "proj_in.weight": (hidden, WIDTH), "proj_in.bias": (hidden,)}
    sizes |= {"proj_out.weight": (width, hidden), "proj_out.bias": (width,)}
    sizes |= {"norm_out.weight": (width,), "norm_out.bias": (width,)}
    for layer in range(4):
        own = {"0.to_q": (inner, hidden), "0.to_kv": (2 * inner, hidden), "0.to_out": (hidden, inner)}
        own |= {"1.1": (4 * hidden, hidden), "1.3": (hidden, 4 * hidden)}
        sizes |= {f"layers.{layer}.{name}.weight": shape for name, shape in own.items()}
        for norm in ("0.norm1", "0.norm2", "1.0"):
            sizes |= {f"layers.{layer}.{norm}.{part}": (hidden,) for part in ("weight", "bias")}
    return {name: draw(*shape) for name, shape in sizes.items()}


def state(unet, kind, seed=5):
    """The weights of an adapter for diffusers' U-Net: plain, plus or full, under the names of published files."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return _normal(generator, *shape)

    made = {
        f"image_proj.{name}": tensor
        for name, tensor in _projection(kind, unet.config.cross_attention_dim, draw).items()
    }
    attentions = [each for name, each in unet.named_modules() if name.endswith(".attn2")]
    for index, attention in enumerate(attentions):
        for part in ("k", "v"):
            shape = getattr(attention, f"to_{part}").weight.shape
            made[f"ip_adapter.{2 * index + 1}.to_{part}_ip.weight"] = 2 * draw(*shape)
    return made
