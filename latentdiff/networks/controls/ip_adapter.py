"""IP-Adapter (Ye et al. 2023): a picture as a prompt.

CLIP reads the picture, a projection makes tokens of its features, and every cross-attention has keys and values of its
own for them: the attention to the picture is added to the attention to the text (equation 5).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.loaders.unet import UNet2DConditionLoadersMixin
from diffusers.models.embeddings import ImageProjection
from torch import Tensor, nn
from transformers import CLIPImageProcessor

from latentdiff.core.turn import Turn
from latentdiff.networks.backbones.unet import UNet
from latentdiff.networks.conditions import FEATURES, Conditions, image_prompt

TOKENS = 4  # of a new adapter


class ImageEncoder(nn.Module):
    """CLIP's tower of pictures: transformers.CLIPVisionModelWithProjection."""

    def __init__(self, model: Any):
        super().__init__()
        self.model, side = model, model.config.image_size
        self._processor = CLIPImageProcessor(size=side, crop_size=side)

    def pixels(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """uint8 pictures (H, W, 3) -> what CLIP reads, (N, 3, S, S) on the CPU: the middle square, normalised."""
        copies = [np.array(each) for each in pictures]  # that torch may write to
        values: Tensor = self._processor(copies, return_tensors="pt", input_data_format="channels_last").pixel_values
        return values

    @torch.no_grad()
    def forward(self, pixels: Tensor, *, all_states: bool) -> Tensor:
        """Features (N, D) of `pixels`; all_states: instead all states before the last layer, (N, L, D)."""
        weight = next(self.model.parameters())
        output = self.model(pixels.to(weight.device, weight.dtype), output_hidden_states=all_states)
        features: Tensor = output.hidden_states[-2] if all_states else output.image_embeds
        return features


class IPAdapter(nn.Module):
    """Features of pictures -> keys and values for each cross-attention of a U-Net.

    projection: one of diffusers', which makes tokens of features. names: of the cross-attentions. encoder: None if
    callers give features.
    """

    def __init__(
        self,
        projection: nn.Module,
        keys: Iterable[nn.Module],
        values: Iterable[nn.Module],
        names: Sequence[str],
        encoder: ImageEncoder | None,
    ):
        super().__init__()
        self.projection, self.keys, self.values = projection, nn.ModuleList(keys), nn.ModuleList(values)
        self.names, self.encoder, self._turn = tuple(names), encoder, Turn()

    @classmethod
    def create(cls, unet: UNet, encoder: ImageEncoder) -> IPAdapter:
        """A new one, whose keys and values begin as those of the text."""
        attentions = unet.cross_attentions()
        width = attentions[0][1].to_k.in_features
        projection = ImageProjection(int(encoder.model.config.projection_dim), width, TOKENS)
        keys, values = ([_layer(getattr(each, name).weight) for _, each in attentions] for name in ("to_k", "to_v"))
        return cls(projection, keys, values, [name for name, _ in attentions], encoder)

    @property
    def reads_all_states(self) -> bool:
        """Whether it reads all states of CLIP before the last layer instead of one vector."""
        return not isinstance(self.projection, ImageProjection)

    @property
    def dtype(self) -> torch.dtype:
        """The precision of its weights."""
        return next(self.keys.parameters()).dtype

    def forward(self, features: Tensor) -> list[Tensor]:
        """Features (B, N, ...) of N pictures -> keys and values of each layer, (B, 2, L, C)."""
        rows = len(features)
        tokens = self.projection(features.flatten(0, 1).to(self.dtype)).reshape(rows, -1, self.keys[0].in_features)
        return [torch.stack([key(tokens), value(tokens)], 1) for key, value in zip(self.keys, self.values, strict=True)]

    def placed(self, device: Any, precision: torch.dtype | str) -> IPAdapter:
        """Itself on a device, in a precision: "float32" or torch's own."""
        return self.to(device, torch.float32 if isinstance(precision, str) else precision)

    @torch.no_grad()
    def features(self, pictures: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Features (N, ...) of uint8 pictures (H, W, 3), and those that stand for no picture, as diffusers has them."""
        assert self.encoder is not None
        with self._turn:
            pixels = self.encoder.pixels(pictures)
            seen = self.encoder(pixels, all_states=self.reads_all_states)
            empty = (
                self.encoder(torch.zeros_like(pixels), all_states=True)
                if self.reads_all_states
                else torch.zeros_like(seen)
            )
            return seen, empty

    @torch.no_grad()
    def heads(self, features: Tensor, scales: Sequence[float]) -> list[Tensor]:
        """Keys and values of each layer, the values times the layer's scale: attention is linear in them.

        features: (B, N, ...) on any device.
        """
        with self._turn:
            both = zip(self(features.to(next(self.keys.parameters()).device)), scales, strict=True)
            return [torch.stack([heads[:, 0], scale * heads[:, 1]], 1) for heads, scale in both]

    def state(self) -> dict[str, Tensor]:
        """Its weights under the names that files of plain IP-Adapters have. Raises TypeError for others."""
        if self.reads_all_states:
            raise TypeError("only a plain IP-Adapter is written")
        own = {f"image_proj.{n.replace('image_embeds', 'proj')}": t for n, t in self.projection.state_dict().items()}
        for index, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            place = f"ip_adapter.{2 * index + 1}"  # self-attentions are counted too
            own |= {f"{place}.to_k_ip.weight": key.weight, f"{place}.to_v_ip.weight": value.weight}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in own.items()}


def _layer(weight: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight.data = weight.detach().clone()
    return made


def from_state(
    attentions: Sequence[tuple[str, int]], width: int, state: Mapping[str, Tensor], encoder: ImageEncoder | None
) -> IPAdapter:
    """An adapter of a file's weights. Raises KeyError, ValueError or RuntimeError for weights of another network.

    attentions: see PromptedByPictures. width: of the text's tokens, which those of a picture have too.
    """
    groups: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in state.items():
        group, _, rest = name.partition(".")
        groups[group][rest] = tensor
    convert = UNet2DConditionLoadersMixin._convert_ip_adapter_image_proj_to_diffusers  # reads nothing of a U-Net
    projection = convert(None, groups["image_proj"], low_cpu_mem_usage=False)
    layers: dict[str, list[nn.Linear]] = {"k": [], "v": []}
    for index, (_, heads) in enumerate(attentions):
        for kind, made in layers.items():
            weight = groups["ip_adapter"][f"{2 * index + 1}.to_{kind}_ip.weight"]
            if tuple(weight.shape) != (heads, width):
                raise ValueError(f"layer {index} has {tuple(weight.shape)}, the U-Net {(heads, width)}")
            made.append(_layer(weight))
    if (more := len(groups["ip_adapter"]) - 2 * len(attentions)) > 0:
        raise ValueError(f"{more} weights belong to no layer")
    adapter = IPAdapter(projection, layers["k"], layers["v"], [name for name, _ in attentions], encoder)
    return adapter.to(next(iter(groups["ip_adapter"].values())).dtype).eval()


class PromptedNetwork(nn.Module):
    """A frozen U-Net and an IP-Adapter that learns, as one module: conditions have `features`, (B, 1, D)."""

    def __init__(self, unet: UNet, adapter: IPAdapter):
        super().__init__()
        self.unet, self.adapter = unet, adapter

    def forward(self, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """The U-Net's output with attention to the pictures."""
        plain = Conditions({name: array for name, array in conditions.arrays.items() if name != FEATURES})
        heads = self.adapter(conditions[FEATURES])
        output: Tensor = self.unet(x, t, plain.joined(image_prompt(0, heads)))
        return output
