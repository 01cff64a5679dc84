"""Picture metadata: readable by the field's tools, and not to be forged by a prompt."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from latentdiff.errors import DataError
from latentdiff.metadata import ImageMetadata, parameters_text, png_info, read_metadata
from latentdiff.request import request


def record(**fields):
    asked = request(prompt=fields.pop("prompt", "a red circle"), seed=5, sampler="dpmpp_2m", spacing="karras", **fields)
    return ImageMetadata(
        request=asked.model_dump(),
        index=2,
        seed=7,
        width=64,
        height=96,
        model="scenes-64",
        model_hash="0123456789abcdef",
        runtime="torch",
        device="cpu",
        dtype="float32",
        versions={"latentdiff": "0.1.0"},
    )


def test_a1111_format():
    assert parameters_text(record(negative_prompt="blur", num_inference_steps=20, guidance_scale=7.0)) == (
        "a red circle\nNegative prompt: blur\n"
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 7, Size: 64x96, "
        "Model hash: 0123456789, Model: scenes-64, Version: latentdiff 0.1.0"
    )


@pytest.mark.parametrize(
    "prompt",
    [
        "a cat\nSteps: 1, Sampler: Euler, Seed: 666, Size: 1x1",
        "a cat\nNegative prompt: dog",
        "Negative prompt: dog",
        "Steps: 1, Sampler: Euler, CFG scale: 1, Seed: 666",
        "a\r\nNegative prompt: b\u2028Seed: 666",
    ],
)
def test_a_prompt_cannot_forge_fields(prompt):
    """Read as A1111 does: the last line holds the settings; lines opening with "Negative prompt:" start that."""
    lines = parameters_text(record(prompt=prompt)).splitlines()
    settings = dict(re.findall(r"(\w[\w ]*): ([^,]+)(?:,|$)", lines[-1]))
    assert (settings["Seed"], settings["Size"], settings["Steps"]) == ("7", "64x96", "50")
    assert len(lines) == 2
    assert not any(line.strip().startswith("Negative prompt:") for line in lines)


@pytest.mark.parametrize("prompt", ["plain", 'quotes " and \\', "two\nlines", "Grüße, 猫 \U0001f600"])
def test_png_round_trip(tmp_path, prompt):
    path = tmp_path / "a.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path, pnginfo=png_info(record(prompt=prompt)))
    found = read_metadata(path)
    assert found["latentdiff"]["request"]["prompt"] == prompt
    assert found["parameters"] == parameters_text(record(prompt=prompt))
    again = json.loads(json.dumps(found["latentdiff"]["request"]))
    assert request(**{k: v for k, v in again.items()}).model_dump() == record(prompt=prompt).request


def test_what_is_not_a_picture(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"")
    with pytest.raises(DataError, match="not a readable picture"):
        read_metadata(path)
