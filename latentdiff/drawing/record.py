"""The record in a picture of how it was made: A1111's `parameters` text, and everything as JSON.

A PNG has two text chunks: `parameters`, which the tools of this field read, and `latentdiff`, the whole request with
its defaults, the model's hash, the versions, runtime and device, from which the picture can be reproduced. In JPEG and
WebP they are EXIF's UserComment, where those tools look, and its ImageDescription.
"""

from __future__ import annotations

import io
import json
import platform
import struct
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from latentdiff.core.decoding import FORMATS, fault, silent_decoders
from latentdiff.core.errors import DataError
from latentdiff.diffusion.grids import LABELS
from latentdiff.diffusion.samplers import SAMPLERS
from latentdiff.drawing.request import REFINER_SWITCH

_UNICODE = b"UNICODE\x00"  # EXIF 2.3, table 9: the encoding of a user comment
_COMFY = {"prompt", "workflow"}  # text chunks of ComfyUI
VERSION = 2  # of the record's fields
LARGEST_EXIF = 65_000  # bytes of a JPEG's segment


@dataclass(frozen=True)
class Source:
    """A file that was used beside the model: its kind, its path, its hash.

    path: a relative path as typed, of an absolute path only the name: pictures do not reveal folders.
    """

    kind: str  # lora, merged (a lora too), embedding, or the name of what is loaded beside the model
    path: str
    sha256: str
    weight: float = 1.0
    word: str | None = None  # the name of an embedding, if not its own
    encoder: str | None = None  # the path of an IP-Adapter's image encoder, like `path`


@dataclass(frozen=True)
class ImageMetadata:
    """One picture's record. `request` is the call's, with defaults; `seed` and `index` belong to this picture.

    steps: the steps of each pass. canvas: the input picture. hints: the pictures of the controls. image_prompts: the
    pictures and masks of each IP-Adapter. batch: its index in its batch, and the batch's size.
    own_noise: whether noise or conditions were the caller's own, and not those of seed and prompt.
    """

    request: dict[str, Any]
    index: int
    seed: int
    width: int
    height: int
    model: str
    model_hash: str
    runtime: str
    device: str
    dtype: str
    versions: dict[str, str]
    steps: tuple[int, ...] = ()
    model_source: str | None = None
    variant: str | None = None
    sources: tuple[Source, ...] = ()
    canvas: dict[str, Any] | None = None
    hints: tuple[dict[str, Any], ...] = ()
    image_prompts: tuple[dict[str, Any], ...] = ()
    batch: tuple[int, int] = (0, 1)
    own_noise: bool = False
    speed: str = "exact"
    quantized: str | None = None
    version: int = VERSION


_COMPUTE = {"torch": ("torch", "diffusers", "transformers"), "openvino": ("openvino", "tokenizers")}


@cache
def installed_versions(runtime: str = "torch") -> dict[str, str]:
    """The versions of the libraries that the pixels depend on."""
    versions = {"python": platform.python_version()}
    for name in ("latentdiff", *_COMPUTE[runtime], "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def parameters_text(record: ImageMetadata) -> str:
    """A1111's format: prompt, negative prompt, then one line of settings.

    Every value stays on one line, so that no prompt can forge another field.
    """
    request = record.request
    lines = [_one_line(request["prompt"])]
    if request["negative_prompt"]:
        lines.append(f"Negative prompt: {_one_line(request['negative_prompt'])}")
    fields = {
        "Steps": request["num_inference_steps"],
        "Sampler": SAMPLERS[request["sampler"]].label,
        "Schedule type": LABELS.get(request["spacing"], "Automatic"),
        "CFG scale": f"{request['guidance_scale']:g}",
        "Seed": request["seed"] if request.get("variation_seed") is not None else record.seed,
        "Size": f"{record.width}x{record.height}",
        "Model hash": record.model_hash[:10],
        "Model": _quoted(record.model),
        **_further_fields(record),
        "Version": f"latentdiff {record.versions.get('latentdiff', 'unknown')}",
    }
    lines.append(", ".join(f"{name}: {value}" for name, value in fields.items()))
    return "\n".join(lines)


def _further_fields(record: ImageMetadata) -> dict[str, Any]:
    """The fields that A1111 writes only if they are used."""
    request, fields = record.request, dict[str, Any]()
    if request.get("variation_seed") is not None:
        fields |= {
            "Variation seed": request["variation_seed"] + record.index,
            "Variation seed strength": request["variation_strength"],
        }
    if record.canvas is not None or request.get("hires_scale") is not None:
        strength = request.get("strength" if record.canvas is not None else "hires_strength")
        fields["Denoising strength"] = (
            f"{record.steps[-1] / request['num_inference_steps'] if strength is None else strength:g}"
        )
    if request.get("mask_blur"):
        fields["Mask blur"] = f"{request['mask_blur']:g}"
    if request.get("padding_mask_crop") is not None:
        fields |= {"Inpaint area": "Only masked", "Masked area padding": request["padding_mask_crop"]}
    if request.get("hires_scale") is not None:
        fields["Hires upscale"] = f"{request['hires_scale']:g}"
    if request.get("clip_skip") is not None:
        fields["Clip skip"] = request["clip_skip"] + 1
    refiner = next((source for source in record.sources if source.kind == "refiner"), None)
    if refiner is not None:
        fields["Refiner"] = _quoted(Path(refiner.path).stem or "refiner")
        switch = request.get("refiner_switch")
        fields["Refiner switch at"] = REFINER_SWITCH if switch is None else switch
    loras = [source for source in record.sources if source.kind in ("lora", "merged")]
    if loras:
        fields["Lora hashes"] = _quoted(", ".join(f"{Path(s.path).stem}: {s.sha256[:12]}" for s in loras))
        fields["Lora weights"] = _quoted(", ".join(f"{Path(s.path).stem}: {s.weight:g}" for s in loras))
    return fields


def _one_line(text: str) -> str:
    """The text without line breaks; a text that begins like a field of the format is quoted."""
    line = " ".join(text.split())
    return json.dumps(line) if line.startswith(("Negative prompt:", "Steps:")) else line


def _quoted(text: str) -> str:
    return json.dumps(text) if any(c in text for c in ',:"\n') else text


def save_options(record: ImageMetadata, suffix: str) -> dict[str, Any]:
    """The arguments of Pillow's save that write a record into a picture of that suffix.

    Raises DataError if the record is too long for a JPEG.
    """
    if suffix == ".png":
        return {"pnginfo": png_info(record)}
    exif, comment = Image.Exif(), _UNICODE + parameters_text(record).encode("utf-16-be")
    exif[ExifTags.Base.ImageDescription] = json.dumps(asdict(record))
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    content = _typed(exif.tobytes(), len(comment))
    if len(content) > LARGEST_EXIF:
        raise DataError("its record is too long for this format. Write a PNG, or no record (--no-metadata)")
    return {"exif": content}


def _typed(exif: bytes, length: int) -> bytes:
    """EXIF whose UserComment has the standard's type, UNDEFINED: Pillow writes BYTE, which readers ignore."""
    order = "<" if exif[6:8] == b"II" else ">"
    written, right = (struct.pack(f"{order}HHI", ExifTags.Base.UserComment, kind, length) for kind in (1, 7))
    return exif.replace(written, right, 1)


def png_info(record: ImageMetadata) -> PngInfo:
    """The text chunks of one picture."""
    info, text = PngInfo(), parameters_text(record)
    if text.isascii():
        info.add_text("parameters", text)
    else:
        info.add_itxt("parameters", text)
    info.add_itxt("latentdiff", json.dumps(asdict(record), ensure_ascii=False))
    return info


def read_metadata(path: Path, *, decoded: bool = True) -> dict[str, Any]:
    """The record in a picture: {"parameters": text, "latentdiff": tree}, as far as it has them.

    ComfyUI's PNG have `prompt` and `workflow`, trees that say how they were made there. decoded: whether the pixels
    are decoded as well, which finds damage.

    Raises DataError if the file is not a picture. The tree comes from outside: validate it before use.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"no such file ({path})") from None
    except OSError as error:
        raise DataError(f"not a readable picture ({path}): {error}") from None
    return read_metadata_of(data, path, decoded=decoded)


def read_metadata_of(data: bytes, name: object, *, decoded: bool = True) -> dict[str, Any]:
    """The record in a picture's bytes; see `read_metadata`. name: for messages."""
    try:
        with silent_decoders(), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if decoded:
                image.load()
            tags: dict[str, Any] = _texts(image)
    except Exception as error:  # decoders raise nearly anything on bytes that are not theirs
        raise DataError(f"not a readable picture ({name}): {fault(error, data)}") from None
    for key in _COMFY & tags.keys():
        with suppress(ValueError, RecursionError):
            tags[key] = json.loads(tags[key])
    if "latentdiff" in tags:
        try:
            tags["latentdiff"] = json.loads(tags["latentdiff"])
        except (ValueError, RecursionError):
            raise DataError(f"its latentdiff record is not JSON ({name})") from None
    return tags


def _texts(image: Image.Image) -> dict[str, Any]:
    """The texts of a PNG's chunks, or of EXIF. A description by a camera, which is not our record, is left out."""
    if image.format == "PNG":
        keys = {"parameters", "latentdiff"} | _COMFY
        return {key: text for key, text in image.info.items() if key in keys and isinstance(text, str)}
    exif, tags = image.getexif(), dict[str, Any]()
    comment = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    if isinstance(comment, bytes) and comment.startswith(_UNICODE):
        tags["parameters"] = comment.removeprefix(_UNICODE).decode("utf-16-be", "replace")
    description = exif.get(ExifTags.Base.ImageDescription)
    if isinstance(description, str) and description.startswith('{"request"'):
        tags["latentdiff"] = description
    return tags
