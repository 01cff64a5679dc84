"""The prompts in the records of pictures that this package has drawn: the captions of a model's own pictures."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

from PIL import Image

from latentdiff.core.errors import DataError
from latentdiff.data.source import captions_in

RECORD = "latentdiff"  # the PNG's text chunk, see drawing/record.py


def prompts_in(path: Path) -> tuple[str, ...]:
    """The prompt in a PNG's record; () for a file without one, which is then a picture without a caption."""
    try:
        with warnings.catch_warnings(), Image.open(path, formats=["PNG"]) as image:
            warnings.simplefilter("ignore")
            prompt = json.loads(image.text[RECORD])["request"]["prompt"]  # type: ignore[attr-defined]
            return captions_in({"text": prompt}, path.name)
    except DataError:  # a prompt that is no text
        raise
    except Exception:  # a picture that cannot be read is reported with its pixels, by core/decoding
        return ()
