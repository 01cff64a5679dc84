"""ControlNet (Zhang et al. 2023): a copy of a U-Net's encoder that reads a picture, whose outputs are added to the
U-Net's skip connections: diffusers.ControlNetModel, and ControlNetUnionModel, which knows several kinds of pictures.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, ControlNetUnionModel
from torch import Tensor, nn

from latentdiff.core.errors import ConfigError
from latentdiff.core.turn import Turn
from latentdiff.networks.conditions import HINT, RESIDUAL, Conditions, added
from latentdiff.networks.saving import save_network
from latentdiff.networks.traced import Traced, example

GRAPH = "controlnet"
WIDTHS = (16, 32, 96, 256)  # channels of the layers that read the picture, each after the first halving it


class ControlNet(nn.Module):
    """(x, t, conditions, hint) -> residuals (B, C, h, w), one for each skip connection and one for the middle."""

    adds, once = RESIDUAL, False

    def __init__(self, model: Any):
        super().__init__()
        self.model, self._turn = model, Turn()

    @classmethod
    def create(cls, unet: Any, factor: int) -> ControlNet:
        """A new one for a U-Net of diffusers', whose encoder it copies; it adds nothing yet (section 3.2).

        factor: pixels of a latent's side.
        """
        model = ControlNetModel(**config_for(unet, factor))
        for name, module in model.named_children():
            if (own := getattr(unet, name, None)) is not None:
                module.load_state_dict(own.state_dict())
        return cls(model)

    @property
    def kinds(self) -> int:
        """The number of kinds of pictures that it distinguishes; 0 if it knows only one."""
        return int(self.model.config.num_control_type) if isinstance(self.model, ControlNetUnionModel) else 0

    @property
    def factor(self) -> int:
        """Pixels of a latent's side, as it reads pictures."""
        return 2 ** (len(self.model.config.conditioning_embedding_out_channels) - 1)

    @property
    def channels(self) -> int:
        """The channels of its pictures."""
        return int(self.model.config.conditioning_channels)

    @property
    def guesses(self) -> bool:
        """Whether it pools the whole picture, like the shuffle model; then it acts on the prompt's condition alone."""
        return bool(self.model.config.get("global_pool_conditions"))

    @property
    def dtype(self) -> torch.dtype:
        """The precision of its weights."""
        return next(self.parameters()).dtype

    def forward(self, x: Tensor, t: Tensor, conditions: Conditions, hint: Tensor, **options: Any) -> list[Tensor]:
        """Residuals with gradients. hint: (B, C, H, W) in [0, 1], in pixels. options: the library's own."""
        conditions, x, hint = conditions.cast(self.dtype), x.to(self.dtype), hint.to(self.dtype)
        added = None
        if "sizes" in conditions.arrays:
            added = {"text_embeds": conditions["pooled"], "time_ids": conditions["sizes"]}
        condition = [hint] if self.kinds else hint
        downs, middle = self.model(
            x[:, : self.model.config.in_channels],  # an inpainting U-Net reads more
            t,
            encoder_hidden_states=conditions["tokens"],
            controlnet_cond=condition,
            added_cond_kwargs=added,
            return_dict=False,
            **options,
        )
        return [*downs, middle]

    @torch.no_grad()
    def residuals(
        self, x: Tensor, t: Tensor, conditions: Conditions, hint: Tensor, *, scale: float, guess: bool, kind: int
    ) -> list[Tensor]:
        """Residuals times a scale. guess: weakens finer ones (section 3.5). kind: of picture, if it knows several."""
        options: dict[str, Any] = {"conditioning_scale": scale, "guess_mode": guess or self.guesses}
        if self.kinds:
            marks = torch.zeros(len(x), self.kinds, device=x.device, dtype=self.dtype)
            marks[:, kind] = 1
            options |= {"control_type": marks, "control_type_idx": [kind], "conditioning_scale": [scale]}
        with self._turn:
            return self(x, t, conditions, hint, **options)

    def traced(self) -> dict[str, Traced]:
        """(x, time (1,), hint, the conditions by name) -> residuals at a scale of 1. Raises ConfigError for unions."""
        if self.kinds:
            raise ConfigError("a ControlNet for several kinds of pictures cannot be exported as a graph")
        config, levels = self.model.config, len(self.model.config.block_out_channels)
        examples = []
        for rows, height, width, length in ((3, 2**levels, 3 * 2 ** (levels - 1), 77), (1, 2 ** (levels - 1), 4, 154)):
            sides = (height * self.factor, width * self.factor)
            inputs = {"x": example(rows, config.in_channels, height, width), "time": torch.tensor([501.0])}
            inputs["hint"] = example(rows, self.channels, *sides).sigmoid()
            for name, shape in self.reads.items():
                inputs[name] = example(rows, *(length if axis is None else axis for axis in shape))
            examples.append(inputs)
        return {GRAPH: Traced(".", self.model, self._function, examples)}

    def _function(self, x: Tensor, time: Tensor, hint: Tensor, **arrays: Tensor) -> tuple[Tensor, ...]:
        return tuple(self(x, time, Conditions(arrays), hint))

    @property
    def reads(self) -> dict[str, tuple[int | None, ...]]:
        """The conditions that it requires, as in Spec."""
        config = self.model.config
        width = config.cross_attention_dim
        reads: dict[str, tuple[int | None, ...]] = {"tokens": (None, width if isinstance(width, int) else width[0])}
        if config.addition_embed_type == "text_time":
            joined, each = config.projection_class_embeddings_input_dim, config.addition_time_embed_dim
            reads |= {"pooled": (joined - 6 * each,), "sizes": (6,)}
        return reads

    def facts(self) -> dict[str, Any]:
        """See Traceable. skips: the channels of its residuals."""
        skips = [*self.model.controlnet_down_blocks, self.model.controlnet_mid_block]
        return {
            "inputs": int(self.model.config.in_channels),
            "factor": self.factor,
            "guesses": self.guesses,
            "reads": {name: list(shape) for name, shape in self.reads.items()},
            "skips": [block.out_channels for block in skips],
        }

    def save(self, directory: Path) -> None:
        """Write config.json and safetensors weights."""
        save_network(self.model, directory)


def config_for(unet: Any, factor: int) -> dict[str, Any]:
    """The config of a ControlNet for a U-Net of diffusers'. factor: pixels of a latent's side."""
    known = inspect.signature(ControlNetModel.__init__).parameters
    config = {name: value for name, value in unet.config.items() if name in known}
    channels = min(int(unet.config.in_channels), int(unet.config.out_channels))  # an inpainting U-Net reads more
    return config | {"in_channels": channels, "conditioning_embedding_out_channels": WIDTHS[: factor.bit_length()]}


class SteeredNetwork(nn.Module):
    """A frozen U-Net and a ControlNet that learns, as one module: conditions have `hint`, (B, C, H, W) in [0, 1]."""

    def __init__(self, unet: nn.Module, control: ControlNet):
        super().__init__()
        self.unet, self.control = unet, control

    def forward(self, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """The U-Net's output with the residuals of the hint."""
        plain = Conditions({name: array for name, array in conditions.arrays.items() if name != HINT})
        residuals = self.control(x, t, plain, conditions[HINT])
        output: Tensor = self.unet(x, t, plain.joined(added(residuals)))
        return output
