"""What the transformers of flow-matching models share, behind the protocols of `networks.protocols`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.core.turn import Turn
from latentdiff.networks.conditions import Conditions
from latentdiff.networks.protocols import PacksLatents, Spec
from latentdiff.networks.saving import save_network
from latentdiff.networks.traced import Inputs, Traced, example

GRAPH = "transformer"  # its part, and the name of its graph
STEP = 64  # graphs read a number of tokens that is a multiple of this, where a mask marks those of the prompt


class Transformer(nn.Module):
    """(x_t, t, conditions) -> output, with x_t (B, C, h, w), t a time or (B,) times.

    Under K conditions x_t runs K times in one batch and the output is (K, B, C, h, w). A family's transformer defines
    `spec` and `output`. masked: whether it reads `mask`, the marks of the prompt's tokens.
    """

    masked = False
    clock: Any = (1.0, 0.0)  # a graph's time is clock[0] t + clock[1]

    def __init__(self, model: Any):
        super().__init__()
        self.model, self._turn = model, Turn()

    @property
    def spec(self) -> Spec:
        """See Backbone."""
        raise NotImplementedError

    @property
    def texts(self) -> dict[str, tuple[int | None, ...]]:
        """The part of `Spec.reads` that is about the prompt: `tokens` (L, D) and `pooled` (P,)."""
        config = self.model.config
        return {"tokens": (None, int(config.joint_attention_dim)), "pooled": (int(config.pooled_projection_dim),)}

    def output(self, x: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """The module's output for x (B, C, h, w) and times (B,)."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """The precision of its weights."""
        return next(self.parameters()).dtype

    def forward(self, x: Tensor, t: Tensor | float, conditions: Conditions) -> Tensor:
        """The network's output; see the class."""
        conditions, x, count = conditions.cast(self.dtype), x.to(self.dtype), conditions.count
        if "guidance" in self.spec.reads and conditions.get("guidance") is None:  # in training: as if there were none
            rows = (count, len(x)) if count else (len(x),)
            conditions = conditions.joined({"guidance": torch.ones(rows, device=x.device)})
        repeated = x.repeat(count, 1, 1, 1) if count else x
        time = torch.as_tensor(t, device=x.device).expand(len(x)).repeat(count or 1)
        output = self.output(repeated, time, conditions.flattened() if count else conditions)
        return output.reshape(count, len(x), *output.shape[1:]) if count else output

    @torch.no_grad()
    def predict(self, x: Tensor, t: Tensor | float, conditions: Conditions) -> Tensor:
        """See Backbone. Gradients are switched off here, since a mode set inside a generator leaks to its caller."""
        with self._turn:
            output: Tensor = self(x, t, conditions)
        return output.float()

    def traced(self) -> dict[str, Traced]:
        """(x, time (1,), the conditions by name) -> output, float32."""
        return {GRAPH: self._traced(self.spec.inputs)}

    def _traced(self, channels: int) -> Traced:
        """The function for x of that many channels."""
        return Traced(GRAPH, self.model, self._function, self._examples(channels), self._reference)

    def _reference(self, x: Tensor, time: Tensor, **arrays: Tensor) -> Tensor:
        factor, shift = self.clock
        if (factor, shift) != (1.0, 0.0):
            time = (time - shift) / factor
        return self.output(x, time.expand(x.shape[0]), Conditions(arrays))

    _function = _reference  # or a form of it that a tracer can follow

    def _examples(self, channels: int) -> list[Inputs]:
        spec, examples = self.spec, list[Inputs]()
        for rows, height, width, length in ((3, 3, 5, 2 * STEP), (1, 4, 8, STEP)):
            sides = (side * spec.multiple for side in (height, width))
            inputs = {"x": example(rows, channels, *sides), "time": torch.tensor([501.0])}
            for name, shape in spec.reads.items():
                inputs[name] = example(rows, *(length if side is None else side for side in shape))
            if self.masked:
                counts = length // 2 + 2 + torch.arange(rows)[:, None]
                inputs["mask"] = (torch.arange(length) < counts).float()
            examples.append(inputs)
        return examples

    def facts(self) -> dict[str, Any]:
        """See Traceable. graphs: their names by the number of channels of x."""
        return self.spec.facts() | {
            "graphs": {str(self.spec.inputs): GRAPH},
            "token_step": STEP if self.masked else 0,
            "packs": isinstance(self, PacksLatents),
            "deep_levels": 0,
            "clock": list(self.clock),
            "skips": [],
        }

    def save_memory(self) -> None:
        """Recompute activations in the backward pass instead of storing them (Chen et al. 2016)."""
        self.model.enable_gradient_checkpointing()

    def save(self, directory: Path) -> None:
        """Write config.json and safetensors weights."""
        save_network(self.model, directory)
