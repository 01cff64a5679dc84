"""The similarity of a picture and a text: the cosine of CLIP's two embeddings, and its gradient in the latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from latentdiff.networks.clip import Clip
from latentdiff.networks.encoders.clip import Tokenizer, tokenize

OURS = ((0.5,) * 3, (0.5,) * 3)  # in [0, 1]: the towers trained here see [-1, 1]


class Scorer(nn.Module):
    """CLIP's towers, and the size, mean and deviation of the pictures that they were trained on."""

    mean: Tensor
    std: Tensor

    def __init__(self, clip: Clip, tokenizer: Tokenizer, normalisation: tuple[Sequence[float], Sequence[float]] = OURS):
        super().__init__()
        self.clip, self.tokenizer = clip.eval().requires_grad_(False), tokenizer
        self.side = int(clip.config["vision_cfg"]["image_size"])
        for name, values in zip(("mean", "std"), normalisation, strict=True):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Unit embeddings (B, E) of prompts."""
        ids = tokenize(self.tokenizer, prompts).to(self.mean.device)
        return functional.normalize(self.clip.towers.encode_text(ids), dim=-1)

    def images(self, images: Tensor) -> Tensor:
        """Unit embeddings (B, E) of images (B, 3, H, W) in [-1, 1], differentiable."""
        if images.shape[-2:] != (self.side, self.side):
            images = functional.interpolate(images, (self.side, self.side), mode="bicubic", antialias=True)
        seen = ((images + 1) / 2 - self.mean) / self.std
        return functional.normalize(self.clip.towers.encode_image(seen), dim=-1)

    @torch.no_grad()
    def score(self, prompts: Sequence[str], images: Tensor) -> Tensor:
        """The cosine (B,) in [-1, 1] of each picture and its prompt."""
        return (self.texts(prompts) * self.images(images)).sum(-1)

    def gradient(self, prompts: Sequence[str], decode: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The gradient in x0 of CLIP's log p(prompt | image): its logit, the temperature times the cosine.

        On the unit sphere this is minus half the temperature times the squared distance of the two embeddings.
        """
        with torch.no_grad():
            texts = self.texts(prompts)
        temperature = float(self.clip.towers.logit_scale.exp())

        def gradient(x0: Tensor) -> Tensor:
            with torch.enable_grad():
                latents = x0.detach().requires_grad_()
                logits = temperature * (self.images(decode(latents)) * texts).sum(-1)
                (slope,) = torch.autograd.grad(logits.sum(), latents)
            return slope

        return gradient
