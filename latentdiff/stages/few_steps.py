"""A student beside its teacher: what both draw from the same noise in 1, 2, 4 and 8 steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from latentdiff.core.images import coloured
from latentdiff.drawing.draw import draw_prompts
from latentdiff.drawing.painter import Painter
from latentdiff.settings.finetuning import FineTuning
from latentdiff.stages.methods import student_settings

FILE = "few-steps.png"
COUNTS = (1, 2, 4, 8)
CAPTION = "above the teacher, below the student, in 1, 2, 4 and 8 steps from the same noise"


def few_steps(painter: Painter, teacher: Any, config: FineTuning, prompts: Sequence[str]) -> list[np.ndarray]:
    """For each prompt uint8 (2 H, 4 W, 3): the rows are the teacher's and the student's, the columns COUNTS.

    teacher: its backbone, which draws by the model's defaults, with guidance; the student draws without, or reads it.
    """
    before = replace(painter, model=replace(painter.model, backbone=teacher))
    rows = []
    for each, settings in ((before, {}), (painter, student_settings(painter.model, config))):
        options: dict[str, Any] = {**settings, "height": config.image_size, "width": config.image_size}
        pictures = [
            coloured(draw_prompts(each, prompts, seed=config.previews.seed, **options | {"num_inference_steps": count}))
            for count in COUNTS
        ]
        rows.append(np.concatenate(pictures, 2))
    return list(np.concatenate(rows, 1))
