"""Picture metadata: readable by the field's tools, and not to be forged by a prompt."""

import json
import re
from dataclasses import replace

import numpy as np
import piexif
import pytest
from piexif.helper import UserComment
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from latentdiff.core.errors import DataError
from latentdiff.drawing.record import ImageMetadata, Source, parameters_text, png_info, read_metadata, save_options
from latentdiff.drawing.reproduce import read_record
from latentdiff.drawing.request import Request, request


def record(**fields):
    options = request(
        prompt=fields.pop("prompt", "a red circle"), seed=5, sampler="dpmpp_2m", spacing="karras", **fields
    )
    return ImageMetadata(
        request=options.model_dump(),
        index=2,
        seed=7,
        width=64,
        height=96,
        model="emoji-128",
        model_hash="0123456789abcdef" * 4,
        runtime="torch",
        device="cpu",
        dtype="float32",
        versions={"latentdiff": "0.1.0"},
    )


def test_a1111_format():
    assert parameters_text(record(negative_prompt="blur", num_inference_steps=20, guidance_scale=7.0)) == (
        "a red circle\nNegative prompt: blur\n"
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 7, Size: 64x96, "
        "Model hash: 0123456789, Model: emoji-128, Version: latentdiff 0.1.0"
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
    result = read_metadata(path)
    assert result["latentdiff"]["request"]["prompt"] == prompt
    assert result["parameters"] == parameters_text(record(prompt=prompt))
    assert read_record(path).request == Request(**record(prompt=prompt).request)


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
@pytest.mark.parametrize("prompt", ["plain", "two\nlines", "Grüße, 猫 \U0001f600"])
def test_exif_round_trip(tmp_path, suffix, prompt):
    """Read by another library too: Pillow's own parsing of UserComment, which A1111's tools look at."""
    path = tmp_path / f"a{suffix}"
    made = record(prompt=prompt)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path, **save_options(made, suffix))
    result = read_metadata(path)
    assert result["parameters"] == parameters_text(made)
    assert read_record(path).request == Request(**made.request)


def test_a_record_too_long_for_a_jpeg():
    with pytest.raises(DataError, match="too long"):
        save_options(record(prompt="猫" * 10_000), ".jpg")


def test_a_camera_s_exif_is_no_record(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = "a holiday"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"ASCII\x00\x00\x00nice"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.jpg", exif=exif)
    assert read_metadata(tmp_path / "a.jpg") == {}


def test_further_fields():
    made = record(variation_seed=3, variation_strength=0.25, clip_skip=1, num_inference_steps=20, strength=0.55)
    lora = Source("merged", "loras/ink.safetensors", "ab" * 32, 0.8)
    made = replace(made, steps=(11,), sources=(lora,), canvas={"image": "a.png"})
    line = parameters_text(made).splitlines()[-1]
    assert (
        "Variation seed: 5, Variation seed strength: 0.25, Denoising strength: 0.55, Clip skip: 2, "
        'Lora hashes: "ink: abababababab", Lora weights: "ink: 0.8", Version' in line
    )


def test_what_is_not_a_picture(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"")
    with pytest.raises(DataError, match="not a readable picture"):
        read_metadata(path)


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_exif_as_others_read_it(tmp_path, suffix):
    """The comment has the type that EXIF gives it, UNDEFINED: piexif, sd-prompt-reader and others find it."""
    prompt, path = "a red “circle” größer", tmp_path / f"a{suffix}"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path, **save_options(record(prompt=prompt), suffix))
    comment = piexif.load(str(path))["Exif"][piexif.ExifIFD.UserComment]
    assert UserComment.load(comment).startswith(prompt)
    kinds = {kind for tag in (b"\x92\x86\x00", b"\x86\x92") for kind in re.findall(tag + b"(.)", path.read_bytes())}
    assert kinds == {b"\x07"}


def test_what_comfyui_writes(tmp_path):
    about = PngInfo()
    about.add_text("prompt", json.dumps({"3": {"class_type": "KSampler", "inputs": {"seed": 5}}}))
    about.add_text("workflow", "{not json")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png", pnginfo=about)
    read = read_metadata(tmp_path / "a.png")
    assert read["prompt"]["3"]["inputs"]["seed"] == 5
    assert read["workflow"] == "{not json"


def test_any_error_of_a_decoder_is_a_bad_picture(tmp_path, monkeypatch):
    """As of a damaged AVIF, whose decoder raises RuntimeError."""
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "load", lambda self: (_ for _ in ()).throw(RuntimeError("Failed to decode")))
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", Image.Image.load, raising=False)
    with pytest.raises(DataError, match=r"not a readable picture \(.*a.png\): broken: Failed to decode"):
        read_metadata(tmp_path / "a.png")


def test_a_variation_is_the_first_seed_with_a_further_variation_seed():
    """Picture 2 of a command starts from the noise of the command's seed, 5, and of variation seed + 2."""
    line = parameters_text(record(variation_seed=3, variation_strength=0.25)).splitlines()[-1]
    assert ", Seed: 5, " in line
    assert ", Variation seed: 5, " in line
