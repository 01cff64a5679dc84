"""A picture reproduced from its record, which is data from outside.

The record is validated before anything is loaded. Its files are searched only in the user's places, beside the picture
and in the current folder, and are used only if they have the hash of the record.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from latentdiff.core.decoding import FORMATS, silent_decoders
from latentdiff.core.errors import ConfigError, DataError, ModelError
from latentdiff.drawing.batch import Batch, Job
from latentdiff.drawing.canvas import BLACK, Margins
from latentdiff.drawing.draw import Drawing, canvas_of
from latentdiff.drawing.files import encoded, open_picture
from latentdiff.drawing.hints import Hint, hints_of
from latentdiff.drawing.image_prompts import LARGEST_NUMBER, ImagePrompt
from latentdiff.drawing.painter import Painter
from latentdiff.drawing.plan import plan
from latentdiff.drawing.record import VERSION, installed_versions, read_metadata
from latentdiff.drawing.request import LONGEST, Pixels, Request
from latentdiff.settings.validation import first_fault

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(max_length=1000)]
Margin = Annotated[int, Field(ge=0, le=LONGEST)]


class Opened(Protocol):
    """The pipeline that draws the picture again; see `latentdiff.pipeline`."""

    @property
    def painter(self) -> Painter: ...  # noqa: D102 - see there
    def request(self, prompt: str, **settings: Any) -> Request: ...  # noqa: D102
    def load_clip(self, directory: Path | None = None) -> None: ...  # noqa: D102
    def load_weaker(self, path: Path) -> None: ...  # noqa: D102
    def load_refiner(self, path: Path) -> None: ...  # noqa: D102
    def load_cascade(self, path: Path) -> None: ...  # noqa: D102
    def load_upscaler(self, path: Path) -> None: ...  # noqa: D102
    def load_vae(self, path: Path) -> None: ...  # noqa: D102
    def load_controlnet(self, path: Path) -> None: ...  # noqa: D102
    def load_few_steps(self) -> None: ...  # noqa: D102
    def load_ip_adapter(self, path: Path, *, image_encoder_folder: Path | None) -> None: ...  # noqa: D102
    def load_textual_inversion(self, path: Path, token: str | None = None) -> Any: ...  # noqa: D102
    def load_lora_weights(self, path: Path, name: str | None, *, weight: float, fuse: bool) -> Any: ...  # noqa: D102


class _Data(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class SourceRecord(_Data):
    """See record.Source."""

    kind: Literal[
        "lora",
        "merged",
        "embedding",
        "weaker",
        "refiner",
        "cascade",
        "upscaler",
        "clip",
        "vae",
        "controlnet",
        "few-steps",
        "ip-adapter",
    ]
    path: Name
    sha256: Hash
    weight: float = Field(1.0, ge=-10, le=10, allow_inf_nan=False)
    word: Annotated[str, Field(max_length=200)] | None = None
    encoder: Name | None = None


class CanvasRecord(_Data):
    """See drawing.canvas.Canvas.record."""

    image: Name | None
    mask: Name | None
    outpaint: tuple[Margin, Margin, Margin, Margin]
    sha256: Hash


class HintRecord(_Data):
    """See drawing.hints.Hint.record."""

    image: Name | None
    annotator: Annotated[str, Field(pattern=r"^[a-z]{1,20}$")] | None = None
    sha256: Hash


class ImagePromptRecord(_Data):
    """See drawing.image_prompts.ImagePrompt.record."""

    pictures: tuple[HintRecord, ...] = Field(max_length=LARGEST_NUMBER)
    masks: tuple[HintRecord, ...] = Field((), max_length=LARGEST_NUMBER)


class Record(_Data):
    """See record.ImageMetadata."""

    request: Request
    index: int = Field(ge=0, lt=10_000)
    seed: int = Field(ge=0, lt=2**64)
    width: Pixels
    height: Pixels
    model: Name
    model_hash: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
    runtime: Literal["torch", "openvino"]
    device: Name
    dtype: Literal["float32", "float16", "bfloat16"]
    versions: dict[str, str]
    steps: tuple[int, ...] = ()
    model_source: Name | None = None
    variant: Annotated[str, Field(pattern=r"^[\w.-]{1,60}$")] | None = None
    sources: tuple[SourceRecord, ...] = Field((), max_length=100)
    canvas: CanvasRecord | None = None
    hints: tuple[HintRecord, ...] = Field((), max_length=20)
    image_prompts: tuple[ImagePromptRecord, ...] = Field((), max_length=20)
    batch: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1, le=1024)]] = (0, 1)
    own_noise: bool = False
    speed: Literal["exact", "fast", "max"] = "exact"
    quantized: Annotated[str, Field(pattern=r"^\w{1,20}$")] | None = None
    version: int = Field(VERSION, ge=1, le=VERSION)


_RENAMED = {  # names in records of version 1 -> today's
    "sampler": {"heun": "heun_exponential"},
    "spacing": {"uniform": "exponential"},
}


def _of_this_version(record: Any) -> Any:
    """A record in today's version; the first one had no number."""
    if not isinstance(record, dict) or record.get("version", 1) != 1 or not isinstance(record.get("request"), dict):
        return record
    request = dict(record["request"])
    for key, names in _RENAMED.items():
        if isinstance(request.get(key), str):
            request[key] = names.get(request[key], request[key])
    return {**record, "request": request, "version": VERSION}


@dataclass(frozen=True)
class Likeness:
    """A comparison of two pictures: values that differ, of how many, by at most how much; versions then and now.

    jpeg: whether both were compared as JPEGs, because one of them is a JPEG.
    """

    differing: int
    values: int
    largest: int
    psnr: float
    versions: dict[str, tuple[str, str]]
    jpeg: bool = False

    @property
    def equal(self) -> bool:
        """Whether every value is the same."""
        return self.differing == 0

    def __str__(self) -> str:
        both = ", both as JPEGs" if self.jpeg else ""
        if self.equal:
            return f"equal: all {self.values:,} values{both}"
        text = f"not equal: {self.differing:,} of {self.values:,} values differ{both}, by at most {self.largest} of 255"
        text += f" (PSNR {self.psnr:.1f} dB)"
        changed = [f"{name} {then} -> {now}" for name, (then, now) in self.versions.items() if then != now]
        return f"{text}; drawn with other versions: {', '.join(changed)}" if changed else text


def read_record(path: Path) -> Record:
    """The validated record of a picture that can be drawn again. Raises DataError, ConfigError."""
    record = record_in(read_metadata(path), path)
    if record.own_noise:
        raise ConfigError(f"drawn from a caller's own noise or embeddings, which the record does not contain ({path})")
    place, size = record.batch
    if record.seed != record.request.seed + record.index or not place < size <= record.request.batch_size:
        raise DataError(f"its record contradicts itself ({path})")
    return record


def record_in(metadata: dict[str, Any], name: object) -> Record:
    """The validated record in a picture's metadata. name: for messages. Raises DataError."""
    if "latentdiff" not in metadata:
        raise DataError(f"this picture has no record of latentdiff ({name})")
    try:
        return Record.model_validate_json(json.dumps(_of_this_version(metadata["latentdiff"])))
    except ValidationError as error:
        fault = first_fault(error)
        raise DataError(f"its record is not valid: {fault.key}: {fault.message[:100]} ({name})") from None


def reproduce(
    path: Path,
    open_model: Callable[..., Opened],
    model: str | Path | None = None,
    sources: Sequence[Path] = (),
    device: str | None = None,
    runtime: str | None = None,
) -> tuple[Any, Likeness]:
    """The picture drawn again, a PIL image, and its likeness to the file.

    open_model: see `LatentDiffusionPipeline.from_pretrained`. model: the place of the model, by default the record's.
    runtime: by default the record's. Raises DataError for an invalid record, ModelError for another model or file,
    ConfigError for a missing one.
    """
    record = read_record(path)
    places = [*sources, path.parent, Path()]
    pipe = open_model(
        _model(record, model),
        runtime=runtime or record.runtime,
        device=device,
        torch_dtype=record.dtype,
        speed=record.speed,
        quantize=record.quantized,
        variant=record.variant,
    )
    card = pipe.painter.model.card
    if card.hash != record.model_hash:
        both = f"{card.name} ({card.hash[:10]}), drawn by {record.model} ({record.model_hash[:10]})"
        raise ModelError(f"another model: {both}. Name the right one by --model")
    for source in record.sources:
        _load(pipe, source, places)
    again = _draw_again(pipe, record, places)
    return again, likeness(path, again, record)


def _model(record: Record, named: str | Path | None) -> str | Path | None:
    """The user's place of the model, or the record's. Raises ConfigError if that does not exist here."""
    if named is not None or record.model_source is None:
        return named
    source = record.model_source
    if "@" in source and not _is_there(Path(source)):
        raise ConfigError(f"drawn by {source} of the hub. Allow it with --model {source.partition('@')[0]}, or a path")
    if Path(source).is_absolute() or ".." in Path(source).parts or not _is_there(Path(source)):
        raise ConfigError(f"its model {record.model} is not at {source!r} here. Name it by --model")
    return source


def _load(pipe: Opened, source: SourceRecord, places: Sequence[Path]) -> None:
    of_a_path: dict[str, Callable[[Path], None]] = {
        "clip": pipe.load_clip,
        "weaker": pipe.load_weaker,
        "refiner": pipe.load_refiner,
        "cascade": pipe.load_cascade,
        "upscaler": pipe.load_upscaler,
        "vae": pipe.load_vae,
        "controlnet": pipe.load_controlnet,
    }
    if source.kind == "clip" and not source.path:
        pipe.load_clip()
    elif source.kind == "few-steps":
        pipe.load_few_steps()
    else:
        path = file_named(source.path, places)
        if source.kind in of_a_path:
            of_a_path[source.kind](path)
        elif source.kind == "ip-adapter":
            encoder = None if source.encoder is None else file_named(source.encoder, places)
            pipe.load_ip_adapter(path, image_encoder_folder=encoder)
        elif source.kind == "embedding":
            pipe.load_textual_inversion(path, source.word)
        else:
            name = f"{path.stem}_{len(pipe.painter.sources) + 1}"  # two files may have the same name
            pipe.load_lora_weights(path, name, weight=source.weight, fuse=source.kind == "merged")
    latest = list(pipe.painter.sources.values())[-1]
    if latest.sha256 != source.sha256:
        both = f"{latest.sha256[:10]}, not {source.sha256[:10]}"
        raise ModelError(f"{source.path or source.kind} is another file now ({both})")


def file_named(name: str, places: Sequence[Path]) -> Path:
    """The file of a record's name: one of the places itself, or inside one. Raises ConfigError."""
    relative = Path(name)
    if not name or relative.is_absolute() or ".." in relative.parts:
        raise ConfigError(f"the record names {name[:60]!r}, which is not searched for: only relative paths are")
    for place in places:
        candidates = [place / relative, place / relative.name]
        if place.name == relative.name:
            candidates.insert(0, place)
        for candidate in candidates:
            if _is_there(candidate):
                return candidate
    raise ConfigError(f"{name} is not here. Give a file or folder of this name, or the folder above it, by --source")


def _is_there(path: Path) -> bool:
    """Whether a file or a folder has this path; not a pipe, for which reading would wait."""
    try:
        return path.is_file() or path.is_dir()
    except (OSError, ValueError):  # no file can have this name
        return False


def _draw_again(pipe: Opened, record: Record, places: Sequence[Path]) -> Any:
    """Draw the picture at its index in a batch of its size, since kernels add in another order for other sizes.

    The other pictures of the batch are copies of it.
    """
    request = pipe.request(**record.request.model_dump())
    painter = pipe.painter
    canvas = None if record.canvas is None else _canvas(painter, request, record.canvas, places)
    place, size = record.batch
    hints = _hints(record.hints, places)
    image_prompts = tuple(
        ImagePrompt(_hints(own.pictures, places), _hints(own.masks, places)) for own in record.image_prompts
    )
    job = Job(
        request, record.index, plan(request, painter.model, canvas), canvas, hints=hints, image_prompts=image_prompts
    )
    return Drawing(painter, Batch([job] * size)).output().images[place]


def _hints(records: Sequence[HintRecord], places: Sequence[Path]) -> tuple[Hint, ...]:
    return tuple(_hint(record, places) for record in records)


def _hint(record: HintRecord, places: Sequence[Path]) -> Hint:
    if record.image is None:
        raise ConfigError("the record does not name the picture of a control or of an image prompt")
    (hint,) = hints_of(open_picture(file_named(record.image, places)), 1, [record.image], record.annotator)
    if hint.record()["sha256"] != record.sha256:
        raise DataError(f"{record.image} is another picture now")
    return hint


def _canvas(painter: Painter, request: Request, record: CanvasRecord, places: Sequence[Path]) -> Any:
    if record.image is None:
        raise ConfigError("the record does not name the picture that it started from")
    image = open_picture(file_named(record.image, places))
    mask = None if record.mask is None else open_picture(file_named(record.mask, places), BLACK)
    canvas = canvas_of(painter.model, request, image, mask, margins=Margins(*record.outpaint))
    if canvas is None or canvas.hash != record.sha256:
        raise DataError(f"{record.image} or its mask is another picture now")
    return canvas


def likeness(path: Path, again: Image.Image, record: Record) -> Likeness:
    """The likeness of the file's picture and one drawn again. Raises DataError if their sizes differ.

    If the file is a JPEG, the other is compared after JPEG's compression.
    """
    with silent_decoders(), Image.open(path, formats=FORMATS) as image:
        then, jpeg = np.asarray(image.convert(again.mode)).astype(int), image.format == "JPEG"
    if jpeg:
        again = Image.open(io.BytesIO(encoded(again, ".jpg", None)))
    now = np.asarray(again).astype(int)
    if then.shape != now.shape:
        sizes = f"{then.shape[1]}x{then.shape[0]}, drawn {again.width}x{again.height}"
        raise DataError(f"the picture was resized since: {sizes} ({path})")
    apart = np.abs(then - now)
    error = float((apart**2).mean())
    versions = installed_versions(record.runtime)
    names = [name for name in record.versions if name in versions]
    return Likeness(
        int((apart > 0).sum()),
        apart.size,
        int(apart.max()),
        math.inf if error == 0 else 10 * math.log10(255**2 / error),
        {name: (record.versions[name], versions[name]) for name in names},
        jpeg,
    )
