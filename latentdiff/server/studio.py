"""What all routes share: the pipeline, its worker, the folder of pictures, and one way from settings to a ticket."""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from prometheus_client import CollectorRegistry, Counter, Gauge

from latentdiff.core.decoding import decode
from latentdiff.core.errors import ConfigError, DataError
from latentdiff.drawing.canvas import Margins
from latentdiff.drawing.draw import canvas_of, jobs_of
from latentdiff.drawing.files import write_pictures
from latentdiff.drawing.record import ImageMetadata
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.server.work import Ticket, Worker

PICTURE = re.compile(r"\d{5,9}-\d{1,20}\.png")
MOST_PIXELS = 2048 * 2048  # of an input picture
MOST_PICTURES = 64  # of one request


@dataclass(frozen=True)
class Given:
    """The pictures of a request: what it starts from, and the mask, uint8 (H, W, 3) and (H, W); white is redrawn."""

    image: np.ndarray | None = None
    mask: np.ndarray | None = None


NOTHING = Given()


class Studio:
    """See the module. folder: where every picture is written."""

    def __init__(self, pipe: LatentDiffusionPipeline, folder: Path, most_waiting: int = 200):
        self.pipe, self.folder = pipe, folder
        self.worker = Worker(pipe, self._keep, most_waiting)
        self.registry = CollectorRegistry()
        self.pictures = Counter("latentdiff_pictures", "Pictures drawn", registry=self.registry)
        self.refused = Counter("latentdiff_refused", "Requests refused", ["status"], registry=self.registry)
        waiting = Gauge("latentdiff_waiting", "Pictures that wait", registry=self.registry)
        waiting.set_function(lambda: self.worker.waiting)

    @property
    def title(self) -> str:
        """The model's name and the beginning of its hash, as A1111 has it."""
        return f"{self.pipe.card.name} [{self.pipe.card.hash[:10]}]"

    def order(
        self,
        settings: dict[str, Any],
        client: str,
        given: Given = NOTHING,
        margins: Sequence[int] = (0, 0, 0, 0),
        previews: int = 0,
    ) -> Ticket:
        """A ticket for a request's pictures. Raises ConfigError, FullError, StoppedError."""
        if settings.get("num_images", 1) > MOST_PICTURES:
            raise ConfigError(f"a request has at most {MOST_PICTURES} pictures (got {settings['num_images']})")
        request = self.pipe.request(**settings)
        canvas = canvas_of(self.pipe.model, request, given.image, given.mask, margins=Margins(*margins))
        return self.worker.submit(jobs_of(self.pipe.model, request, canvas), client, previews)

    def _keep(self, image: Image.Image, record: ImageMetadata) -> str:
        """Write a picture into the folder; its name there."""
        self.pictures.inc()
        ((path, _),) = write_pictures([image], [record], self.folder, ".png", metadata=True)
        return path.name

    def path_of(self, name: str) -> Path | None:
        """The file of a picture that was drawn here; None for any other name."""
        path = self.folder / name
        return path if PICTURE.fullmatch(name) and path.is_file() and not path.is_symlink() else None


def read_picture(data: bytes, what: str) -> np.ndarray:
    """A client's picture, uint8 (H, W, 3), on white. Raises DataError."""
    try:
        return decode(data, (255, 255, 255), MOST_PIXELS).pixels
    except DataError as error:
        raise DataError(f"{what}: {error}") from None


def transparent_parts(data: bytes, what: str) -> np.ndarray:
    """Where a client's picture is transparent, uint8 (H, W), 255 for completely. Raises DataError."""
    read_picture(data, what)  # bounds and refusals
    with Image.open(io.BytesIO(data)) as image:
        return 255 - np.asarray(image.convert("RGBA").getchannel("A"))


def from_base64(text: str) -> bytes:
    """The bytes of base64, or of a data URL. Raises ConfigError; addresses are never fetched."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ConfigError("a picture must be in base64; addresses are never fetched") from None


def to_base64(data: bytes) -> str:
    """Base64 without a prefix."""
    return base64.b64encode(data).decode()
