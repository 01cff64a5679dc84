"""What all routes share: the models, the worker, the folder of pictures, and one way from settings to a ticket."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from prometheus_client import CollectorRegistry, Counter, Gauge
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from latentdiff.core.decoding import FORMATS, WHITE, Color, decode
from latentdiff.core.errors import ConfigError, DataError, ResourceError
from latentdiff.drawing.canvas import BLACK, Margins
from latentdiff.drawing.draw import canvas_of, jobs_of
from latentdiff.drawing.files import write_pictures
from latentdiff.drawing.hints import Hint
from latentdiff.drawing.painter import torch_only
from latentdiff.drawing.presets import settled_for
from latentdiff.drawing.record import ImageMetadata
from latentdiff.drawing.request import request as made
from latentdiff.pipeline import LatentDiffusionPipeline
from latentdiff.server.history import PICTURE, History
from latentdiff.server.shelf import Adapter, Shelf, Wanted, without_tags
from latentdiff.server.work import PAUSE, FullError, PictureFile, StoppedError, Ticket, Worker

RUNS = Path("runs")
MOST_PIXELS = 2048 * 2048  # of an input picture
MOST_PICTURES = 64  # of one request
MOST_LOADING = 16  # requests that wait for a model to be loaded


class MissingError(DataError):
    """There is nothing of this name."""


@dataclass(frozen=True)
class Order:
    """What a client asks for: settings of drawing, and the model and adapters beside those that the prompt names.

    image, mask: what drawing starts from, uint8 (H, W, 3) and (H, W); white is redrawn. margins: to add around it.
    controls, hints: the ControlNets, and the picture that each reads.
    previews, follow, interruptible, is_kept: see Ticket. sha256: the hash that the model must have, if that is known.
    fast: whether the model's student of few steps draws.
    """

    settings: Mapping[str, Any]
    client: str = ""
    model: str | None = None
    adapters: tuple[Adapter, ...] = ()
    image: np.ndarray | None = None
    mask: np.ndarray | None = None
    margins: Margins = Margins()  # noqa: RUF009 - frozen
    previews: int = 0
    follow: bool = False
    interruptible: bool = False
    sha256: str | None = None
    controls: tuple[str, ...] = ()
    hints: tuple[Hint, ...] = ()
    fast: bool = False
    is_kept: bool = True


class Studio:
    """See the module. folder: where every picture is written. runs: the folder of the run folders, to be shown."""

    def __init__(self, shelf: Shelf, folder: Path, most_waiting: int = 200, runs: Path = RUNS):
        self.shelf, self.folder, self.runs = shelf, folder, runs
        self.history = History(folder)
        self.worker = Worker(self._keep, most_waiting)
        self._loading, self._loads, self._held = 0, asyncio.Lock(), list[LatentDiffusionPipeline]()
        self.registry = CollectorRegistry()
        self.pictures = Counter("latentdiff_pictures", "Pictures drawn", registry=self.registry)
        self.refused = Counter("latentdiff_refused", "Requests refused", ["status"], registry=self.registry)
        waiting = Gauge("latentdiff_waiting", "Pictures that wait", registry=self.registry)
        waiting.set_function(lambda: self.worker.waiting)

    async def model(self, name: str | None = None) -> LatentDiffusionPipeline:
        """A model without adapters; None is the one that is chosen now. Raises ConfigError, ModelError."""
        with self._holding() as held:
            return await self._take(Wanted(name or self.shelf.current), held)

    async def submit(self, order: Order) -> Ticket:
        """A ticket for an order's pictures. Raises ConfigError, ModelError, FullError, StoppedError."""
        count = order.settings.get("num_images", 1)
        if isinstance(count, int) and count > MOST_PICTURES:
            raise ConfigError(f"a request has at most {MOST_PICTURES} pictures (got {count})")
        if not isinstance(order.settings["prompt"], str):
            raise ConfigError("prompt must be text")
        prompt, adapters = without_tags(order.settings["prompt"])
        settings = {**order.settings, "prompt": prompt}
        named = order.model or self.shelf.current, (*order.adapters, *adapters)
        wanted = Wanted(*named, controls=order.controls, fast=order.fast)
        with self._holding() as held:
            pipe = await self._take(wanted, held)
            if order.sha256 not in (None, pipe.card.hash):
                raise ConfigError(f"it was drawn by another model that is called {wanted.model} too")
            if torch_only(made(**settled_for(pipe.model, settings)), pipe.model):
                self._release(held)  # a model that waits for another one's place must not hold one
                pipe = await self._take(wanted._replace(torch=True), held)
            request = pipe.request(**settings)
            canvas = canvas_of(pipe.model, request, order.image, order.mask, margins=order.margins)
            jobs = jobs_of(pipe.model, request, canvas, hints=order.hints)
            watching = order.previews, order.follow, order.interruptible, order.is_kept
            return self.worker.submit(Ticket(pipe.painter, jobs, order.client, *watching))

    @contextmanager
    def _holding(self) -> Iterator[list[LatentDiffusionPipeline]]:
        """A block that holds the models which are loaded for it, until its pictures are in the queue."""
        held: list[LatentDiffusionPipeline] = []
        try:
            yield held
        finally:
            self._release(held)

    def _release(self, held: list[LatentDiffusionPipeline]) -> None:
        for pipe in held:
            self._held.remove(pipe)
        held.clear()

    async def _take(self, wanted: Wanted, held: list[LatentDiffusionPipeline]) -> LatentDiffusionPipeline:
        """From the shelf. Models are loaded one at a time in a thread; a server that stops does not wait for them."""
        loaded = self.shelf.loaded(wanted)
        if loaded is not None:
            return loaded
        if self._loading >= MOST_LOADING:
            raise FullError(f"{MOST_LOADING} requests wait for models to be loaded. Ask again later")
        task = asyncio.create_task(self._load(wanted, held))
        self._loading += 1
        try:
            while not task.done():
                await asyncio.wait([task], timeout=PAUSE)
                if self.worker.stopping and not task.done():
                    task.cancel()
                    raise StoppedError("the server stops")
            return task.result()
        finally:
            self._loading -= 1

    async def _load(self, wanted: Wanted, held: list[LatentDiffusionPipeline]) -> LatentDiffusionPipeline:
        async with self._loads:
            pipe = self.shelf.loaded(wanted)
            while pipe is None and len(self._in_use()) >= self.shelf.keep:
                await asyncio.sleep(PAUSE)  # waiting pictures hold their models: one more would exceed the limit
            pipe = await run_in_threadpool(self.shelf.take, wanted, self._in_use()) if pipe is None else pipe
            self._held.append(pipe)
            held.append(pipe)
            return pipe

    def _in_use(self) -> set[int]:
        """The ids of the painters that pictures in the queue hold, or requests on their way there."""
        return self.worker.painters() | {id(pipe.painter) for pipe in self._held}

    def _keep(self, image: Image.Image, record: ImageMetadata) -> PictureFile:
        """Write a picture into the folder."""
        try:
            ((path, _),) = write_pictures([image], [record], self.folder, ".png", metadata=True)
            kept = PictureFile(path.name, path.read_bytes())
        except OSError as error:
            raise ResourceError(f"a picture cannot be written to {self.folder} ({error.strerror or error})") from None
        self.pictures.inc()
        return kept

    def path_of(self, name: str) -> Path | None:
        """The file of a picture that was drawn here; None for any other name."""
        path = self.folder / name
        return path if PICTURE.fullmatch(name) and path.is_file() and not path.is_symlink() else None


def client_of(http: Request) -> str:
    """The address that a request comes from: what one client may have in the queue is bounded."""
    return http.client.host if http.client else ""


def read_picture(data: bytes, what: str, background: Color = WHITE) -> np.ndarray:
    """A client's picture, uint8 (H, W, 3). Raises DataError."""
    try:
        return decode(data, background, MOST_PIXELS).pixels
    except DataError as error:
        raise DataError(f"{what}: {error}") from None


def picture_mask(data: bytes, image: np.ndarray, *, inverted: bool = False) -> np.ndarray:
    """A client's mask in grey at the picture's size, uint8 (H, W); white is redrawn, transparent parts are not.

    Raises DataError.
    """
    grey = Image.fromarray(read_picture(data, "mask", BLACK)).convert("L")
    if grey.size != image.shape[1::-1]:
        grey = grey.resize(image.shape[1::-1], Image.Resampling.LANCZOS)
    return 255 - np.asarray(grey) if inverted else np.asarray(grey)


def transparent_parts(data: bytes, what: str) -> np.ndarray:
    """Where a client's picture is transparent, uint8 (H, W), 255 for completely. Raises DataError."""
    read_picture(data, what)  # bounds and refusals
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        upright = ImageOps.exif_transpose(image)
        return 255 - np.asarray(upright.convert("RGBA").getchannel("A"))


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
