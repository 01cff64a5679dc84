"""Names of classes as conditions: a prompt is a class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.networks.encoders.reading import ClassReading


class ClassLabels(ClassReading, nn.Module):
    """See ClassReading. It has no weights."""

    kind = "classes"

    def __init__(self, names: Sequence[str]):
        nn.Module.__init__(self)
        ClassReading.__init__(self, names)

    @property
    def texts(self) -> Mapping[str, Any]:
        """There are no text encoders."""
        return {}

    def options(self) -> dict[str, Any]:
        """What ClassReading takes."""
        return {"names": list(self.names)}

    def labels(self, names: Sequence[str]) -> Tensor:
        """The numbers of classes, (B,)."""
        return torch.tensor([float(self.label(name)) for name in names])

    def save(self, directory: Path) -> None:
        """Write nothing: the names are in model_index.json."""
