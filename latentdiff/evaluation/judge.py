"""An independent judge of what a picture shows: a small convolutional classifier of named things.

It shares nothing with a model's CLIP: neither weights nor kind of network nor training. `scripts/judge.py` trains it on
a library of sprites; a folder holds `judge.json` (architecture, side, names) and `judge.safetensors`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from latentdiff.core.errors import ModelError, loading
from latentdiff.core.images import to_images
from latentdiff.evaluation.objects import cropped, objects, united

CONFIG, WEIGHTS = "judge.json", "judge.safetensors"
AT_ONCE = 64


class Judge(nn.Module):
    """See the module. side: of the squares that it looks at, in pixels; names: of its classes."""

    def __init__(self, architecture: str, side: int, names: Sequence[str]):
        import timm

        super().__init__()
        self.architecture, self.side, self.classes = architecture, side, tuple(names)
        self.network = timm.create_model(architecture, pretrained=False, num_classes=len(names))

    def forward(self, squares: Tensor) -> Tensor:
        """The logits (B, N) of squares (B, 3, side, side) in [-1, 1]."""
        logits: Tensor = self.network(squares)
        return logits

    @torch.no_grad()
    def best(self, squares: np.ndarray, count: int = 5) -> list[list[str]]:
        """The likeliest names of uint8 (B, side, side, 3), the first the likeliest."""
        self.eval()
        rows: list[list[str]] = []
        for first in range(0, len(squares), AT_ONCE):
            logits = self(to_images(squares[first : first + AT_ONCE]))
            top = logits.topk(min(count, len(self.classes))).indices
            rows += [[self.classes[k] for k in row] for row in top.tolist()]
        return rows

    @torch.no_grad()
    def features(self, squares: np.ndarray) -> np.ndarray:
        """Unit features (B, D), float32, of uint8 (B, side, side, 3): what the last layer reads."""
        self.eval()
        rows = []
        for first in range(0, len(squares), AT_ONCE):
            maps = self.network.forward_features(to_images(squares[first : first + AT_ONCE]))
            rows.append(functional.normalize(self.network.forward_head(maps, pre_logits=True), dim=-1))
        return np.asarray(torch.cat(rows).numpy())

    def look(self, picture: np.ndarray) -> np.ndarray:
        """The square that shows everything in a picture, uint8 (side, side, 3)."""
        parts = objects(picture)
        return cropped(picture, united(parts).box if parts else (0, 0, *picture.shape[:2]), self.side)

    def save(self, folder: Path) -> None:
        """Write the folder, in half precision."""
        folder.mkdir(parents=True, exist_ok=True)
        facts = {"architecture": self.architecture, "side": self.side, "names": self.classes}
        (folder / CONFIG).write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")
        state = self.state_dict().items()
        halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state}
        save_file(halves, folder / WEIGHTS)

    @classmethod
    def load(cls, folder: Path) -> Judge:
        """Read what `save` wrote. Raises ModelError."""
        if not (folder / CONFIG).is_file():
            raise ModelError(f"no judge at {folder}. It is a folder with judge.json (scripts/judge.py makes one)")
        with loading("judge", folder):
            facts = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            judge = cls(str(facts["architecture"]), int(facts["side"]), [str(name) for name in facts["names"]])
            judge.load_state_dict(load_file(folder / WEIGHTS))
        return judge.eval()
