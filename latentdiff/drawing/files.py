"""Pictures as files: their folders, names and records. No file is ever overwritten."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentdiff.core.errors import ConfigError, DataError
from latentdiff.core.files import check_writable, write_new

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from latentdiff.core.decoding import Color
    from latentdiff.drawing.record import ImageMetadata

_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95}),
    ".jpeg": ("JPEG", {"quality": 95}),
    ".webp": ("WEBP", {"lossless": True}),
}
_NEXT = Path()  # stands for the next free number of a folder
_OTHERS = (".gif", ".bmp", ".tif", ".tiff", ".avif")


def check_target(output: Path, count: int, *, resume: bool = False) -> None:
    """Check the output before any work: a folder that can be written to, or a new file for a single picture.

    resume: the file may exist. Nothing is created yet. Raises ConfigError.
    """
    suffix = output.suffix.lower()
    if suffix in _OTHERS:
        raise ConfigError(f"pictures are written as {', '.join(_FORMATS)} ({output})")
    single = suffix_of(output) is not None
    if single and count > 1:
        raise ConfigError(f"{count} pictures do not go into one file ({output}). Name a folder")
    check_writable(output, output.parent if single else output)
    if single and os.path.lexists(output) and not resume:
        raise ConfigError(f"file exists ({output}). Pictures are never overwritten")
    if not single and output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file, but not {', '.join(_FORMATS)}. Name a folder")


def suffix_of(output: Path) -> str | None:
    """A picture file's suffix; None for a folder."""
    suffix = output.suffix.lower()
    return suffix if suffix in _FORMATS else None


def check_file(output: Path) -> None:
    """Like `check_target`, but only for a file."""
    if suffix_of(output) is None:
        raise ConfigError(f"a picture is written as {', '.join(_FORMATS)} ({output})")
    check_target(output, 1)


def write_pictures(
    images: Sequence[Any],
    records: Sequence[ImageMetadata],
    target: Path,
    suffix: str,
    metadata: bool,
    paths: Sequence[Path | None] | None = None,
) -> Iterator[tuple[Path, ImageMetadata]]:
    """Write each picture and yield its file and its record.

    paths: a file for each picture, None to skip it; without `paths` the next numbers of the folder.
    """
    targets = paths or [target if suffix_of(target) else _NEXT] * len(images)
    for image, record, chosen in zip(images, records, targets, strict=True):
        if chosen is None:
            continue
        path = _next_path(target, record.seed, suffix) if chosen is _NEXT else chosen
        path.parent.mkdir(parents=True, exist_ok=True)
        data = encoded(image, path.suffix.lower(), record if metadata else None)
        while True:
            try:
                write_new(path, data)
                break
            except FileExistsError:  # another process has taken this number
                if chosen is not _NEXT:
                    raise
                path = _next_path(target, record.seed, suffix)
        yield path, record


def encoded(image: Any, suffix: str, record: ImageMetadata | None, quality: int | None = None) -> bytes:
    """A PIL image encoded as a file; without a quality, 0 to 100, JPEG has 95 and WebP is lossless."""
    from latentdiff.drawing.record import save_options

    kind, options = _FORMATS[suffix]
    options = options if quality is None else {"quality": quality}
    content = io.BytesIO()
    image.save(content, kind, **options, **(save_options(record, suffix) if record else {}))
    return content.getvalue()


def loses_pixels(suffix: str) -> bool:
    """Whether such a file changes pixels."""
    return _FORMATS[suffix][0] == "JPEG"


def _next_path(folder: Path, seed: int, suffix: str) -> Path:
    """folder/NNNNN-SEED.png with the next number after the existing files."""
    return numbered(folder, next_number(folder, r"(\d{5,9})-.*\.(png|jpe?g|webp|gif)"), seed, suffix)


def next_number(folder: Path, pattern: str) -> int:
    """One more than the largest number of the folder's files, which is the pattern's first group; 1 without any."""
    names = map(re.compile(pattern).fullmatch, os.listdir(folder) if folder.is_dir() else ())  # noqa: PTH208 - a folder of 100,000 pictures
    return 1 + max((int(name[1]) for name in names if name), default=0)


def numbered(folder: Path, number: int, seed: int, suffix: str) -> Path:
    """folder/NNNNN-SEED.png."""
    return folder / f"{number:05d}-{seed}{suffix}"


def open_fitted(path: Path, size: tuple[int, int]) -> np.ndarray:
    """The largest middle part of a picture file in the aspect of `size`, (height, width), resized to it, uint8.

    Raises DataError.
    """
    import numpy as np
    from PIL import ImageOps

    return np.asarray(ImageOps.fit(open_picture(path), size[::-1]))


def open_picture(path: Path, background: Color = (255, 255, 255)) -> Image.Image:
    """A picture file of the user's, decoded completely, with a background under transparency. Raises DataError."""
    from PIL import Image

    from latentdiff.core.decoding import decode, silent_decoders

    try:
        if path.exists() and not path.is_file():
            raise DataError("is a folder, not a picture" if path.is_dir() else "is not a file")
        with silent_decoders():
            return Image.fromarray(decode(path.read_bytes(), background).pixels)
    except DataError as error:
        raise DataError(f"{str(path)[:200]}: {error}") from None
    except (OSError, ValueError) as error:  # also for names that no file can have
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{str(path)[:200]}: {reason.lower()}") from None
