"""The web page: its files, what it asks about models, and pictures as they are drawn.

The page is a few hundred lines of HTML, CSS and JavaScript without a framework. It starts with the server, loads
nothing from another host, and everything goes through the guard, the queue and the routes that other clients use.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import asdict
from functools import cache
from importlib.resources import files
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from latentdiff.core.errors import LatentDiffError
from latentdiff.diffusion.grids import GRIDS
from latentdiff.diffusion.samplers import SAMPLERS
from latentdiff.drawing.canvas import Margins
from latentdiff.drawing.files import encoded
from latentdiff.drawing.reproduce import record_in
from latentdiff.server.gallery import summary
from latentdiff.server.shelf import Adapter
from latentdiff.server.studio import (
    MissingError,
    Order,
    Studio,
    client_of,
    from_base64,
    picture_mask,
    read_picture,
    to_base64,
)
from latentdiff.server.work import FinishedPicture, Moved, Preview, Ticket, finished_pictures

TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
POLICY = (  # of the page: scripts, pictures and addresses of this server alone; in no frame of another page
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
Margin = Annotated[int, Field(ge=0, le=4096)]


class Chosen(BaseModel):
    """An adapter and its weight."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: str
    weight: Annotated[float, Field(ge=-10, le=10)] = 1.0


class Body(BaseModel):
    """What the page asks to draw; pictures are in base64.

    settings: of drawing, with seeds as text. hash: of the model that drew a picture, if one is drawn again.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    settings: dict[str, Any]
    model: str | None = None
    hash: str | None = None
    adapters: Annotated[list[Chosen], Field(max_length=20)] = []
    image: str | None = None
    mask: str | None = None
    margins: tuple[Margin, Margin, Margin, Margin] = (0, 0, 0, 0)
    previews: Annotated[int, Field(ge=0, le=50)] = 0

    def order(self, client: str) -> Order:
        """The order. Raises ConfigError, DataError."""
        settings = {"prompt": "", **self.settings}
        for name in ("seed", "variation_seed"):
            if isinstance(seed := settings.get(name), str):
                settings[name] = int(seed) if seed.isdecimal() and len(seed) <= 20 else seed
        image = None if self.image is None else read_picture(from_base64(self.image), "the picture")
        mask = None if self.mask is None or image is None else picture_mask(from_base64(self.mask), image)
        return Order(
            settings,
            client,
            self.model,
            tuple(Adapter(each.name, each.weight) for each in self.adapters),
            image,
            mask,
            Margins(*self.margins),
            self.previews,
            follow=True,
            sha256=self.hash,
        )


class Live(BaseModel):
    """What is drawn while the prompt is typed: one picture in few steps, which is not kept. seed: as text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str
    model: str | None = None
    seed: Annotated[str, Field(pattern=r"^\d{1,20}$")] = "0"
    width: int | None = None
    height: int | None = None

    def order(self, client: str) -> Order:
        """The order."""
        size = {name: side for name, side in (("width", self.width), ("height", self.height)) if side is not None}
        settings = {"prompt": self.prompt, "seed": int(self.seed), **size}
        return Order(settings, client, self.model, fast=True, is_kept=False)


def routes(studio: Studio) -> APIRouter:
    """The page, and what it asks."""
    router = APIRouter()

    @router.api_route("/", methods=["GET", "HEAD"])
    def index() -> Response:
        return _file("index.html")

    @router.get("/page/{name}")
    def file(name: str) -> Response:
        return _file(name)

    @router.get("/api/choices")
    def choices() -> dict[str, Any]:
        """What may be chosen."""
        return {
            "models": studio.shelf.names(),
            "model": studio.shelf.current,
            "adapters": studio.shelf.adapters(),
            "samplers": [{"name": name, "label": row.label} for name, row in SAMPLERS.items()],
            "spacings": list(GRIDS),
        }

    @router.get("/api/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """A model's sizes and the settings that a request without any has; the model is loaded if need be."""
        pipe = await studio.model(name)
        settings = pipe.request("", seed=0).model_dump()
        height, width = pipe.card.size
        return {
            "name": name,
            "hash": pipe.card.hash,
            "width": width,
            "height": height,
            "multiple": pipe.model.multiple,
            "settings": settings,
            "live": pipe.has_few_steps,
        }

    @router.post("/api/draw")
    async def draw(body: Body, http: HttpRequest) -> Response:
        ticket = await studio.submit(await run_in_threadpool(body.order, client_of(http)))
        return StreamingResponse(_events_of(studio, ticket), media_type="application/x-ndjson")

    @router.post("/api/live")
    async def live(body: Live, http: HttpRequest) -> dict[str, Any]:
        """A picture in few steps, as a data URL."""
        ticket = await studio.submit(body.order(client_of(http)))
        async for event in finished_pictures(ticket, http.is_disconnected):
            image = to_base64(await run_in_threadpool(encoded, event.image, ".png", None))
        return {"image": f"data:image/png;base64,{image}", "notes": [*event.notes]}

    return router


@cache
def _files() -> dict[str, bytes]:
    folder = files("latentdiff.server") / "static"
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def _file(name: str) -> Response:
    content = _files().get(name)
    if content is None:
        raise MissingError("no such file")
    headers = {"content-security-policy": POLICY, "cache-control": "no-cache", "referrer-policy": "no-referrer"}
    return Response(content, media_type=TYPES[name[name.rindex(".") :]], headers=headers)


async def _events_of(studio: Studio, ticket: Ticket) -> AsyncIterator[str]:
    """One JSON object a line: places in the queue, steps, previews, pictures, and what went wrong."""
    yield _line(_progress(studio, ticket))
    try:
        async for event in ticket.events():
            if isinstance(event, Moved):
                yield _line(_progress(studio, ticket))
            else:
                yield _line(await run_in_threadpool(_facts, studio, event))
    except LatentDiffError as error:
        yield _line({"kind": "error", "message": str(error)})


def _facts(studio: Studio, event: Preview | FinishedPicture) -> dict[str, Any]:
    if isinstance(event, Preview):
        data = to_base64(encoded(event.image, ".png", None))
        return {"kind": "preview", "number": event.number, "image": f"data:image/png;base64,{data}"}
    name = event.kept.name
    record = summary(record_in({"latentdiff": asdict(event.record)}, name), studio.shelf.own)
    return {"kind": "picture", "number": event.number, "name": name, "record": record, "notes": [*event.notes]}


def _progress(studio: Studio, ticket: Ticket) -> dict[str, Any]:
    numbers = {"done": ticket.done, "steps": ticket.steps, "seconds": ticket.seconds_left}
    return {"kind": "progress", "pictures": len(ticket.jobs), "ahead": studio.worker.ahead_of(ticket), **numbers}


def _line(facts: dict[str, Any]) -> str:
    return json.dumps(facts) + "\n"
