"""A low-rank adapter as a value: what it adds to each layer of each network.

W' = W + weight * alpha / rank * B A (Hu et al. 2021, section 4.1)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

Networks = Mapping[str, nn.Module]  # unet, text_encoder, text_encoder_2: the libraries' own modules


@dataclass(frozen=True)
class Layer:
    """What an adapter adds to one layer, by PEFT's names of the factors. alpha is None if the file has none.

    Other kinds have LyCORIS' names: hada_*, lokr_*; dora_scale, lengths in the axes of the weight; diff and diff_b.
    """

    factors: dict[str, Tensor]
    alpha: float | None = None
    rslora: bool = False

    @property
    def rank(self) -> int:
        """The inner dimension."""
        for name, axis in (("lora_A.weight", 0), ("hada_w1_b", 0), ("lokr_w2_b", 0), ("lokr_w1_b", 0)):
            if name in self.factors:
                return int(self.factors[name].shape[axis])
        return 1

    @property
    def kind(self) -> str:
        """The kind of factors: lora, loha, lokr, or full: a difference of the whole weight."""
        marks = {"lora": "lora_", "loha": "hada_", "lokr": "lokr_", "full": "diff"}
        return next((kind for kind, mark in marks.items() if self._has(mark)), "lora")

    @property
    def carried(self) -> bool:
        """Whether PEFT can compute it beside the network's layer; the others are added to the weights."""
        return self.kind == "lora" and "dora_scale" not in self.factors

    @property
    def scale(self) -> float:
        """alpha / rank, or alpha / sqrt(rank) for a rank-stabilised adapter; 1 without alpha."""
        return self.full_alpha / (self.rank**0.5 if self.rslora else self.rank)

    @property
    def full_alpha(self) -> float:
        """alpha, or the rank if the file has none."""
        return self.rank if self.alpha is None else self.alpha

    def _has(self, mark: str) -> bool:
        return any(name.startswith(mark) for name in self.factors)


@dataclass(frozen=True)
class Adapter:
    """Layers by part and module. unused: names that match no layer of the model. missing: absent halves of layers.

    words: textual inversions in the same file, each as the tensors of a file of its own.
    """

    layers: dict[str, dict[str, Layer]]
    unused: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    words: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def matched(self) -> int:
        """The number of layers that it changes."""
        return sum(map(len, self.layers.values()))
