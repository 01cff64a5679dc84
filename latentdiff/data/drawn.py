"""The prompts in the records of pictures that this package has drawn: the captions of a model's own pictures."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

RECORD = "latentdiff"  # the PNG's text chunk, see drawing/record.py


def prompts_in(path: Path) -> tuple[str, ...]:
    """The prompt in a PNG's record; () for a file without one, which is then a picture without a caption."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            prompt = json.loads(image.text[RECORD])["request"]["prompt"]  # type: ignore[attr-defined]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return ()
    return (prompt,) if isinstance(prompt, str) and prompt.strip() else ()
