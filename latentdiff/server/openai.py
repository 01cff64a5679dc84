"""OpenAI's images API: generations, edits and variations, whole or streamed, and the list of models.

https://platform.openai.com/docs/api-reference/images. A mask's fully transparent parts are redrawn. What the API has
and this server does not use is named in the header `x-ignored`; settings of drawing may be sent beside OpenAI's own.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from latentdiff.core.errors import ConfigError, DataError, LatentDiffError
from latentdiff.drawing.files import encoded
from latentdiff.drawing.request import Request
from latentdiff.server.answers import failure, ignored
from latentdiff.server.studio import Order, Studio, client_of, read_picture, to_base64, transparent_parts
from latentdiff.server.work import FinishedPicture, Moved, Preview, Ticket, finished_pictures

ALIASES = ("default", "dall-e-2", "dall-e-3", "gpt-image-1")
VARIED = 0.6  # strength of a variation
USAGE = {  # tokens that are paid for
    **dict.fromkeys(("total_tokens", "input_tokens", "output_tokens"), 0),
    "input_tokens_details": {"text_tokens": 0, "image_tokens": 0},
}
_LOSSY = ("jpeg", "webp")


class Body(BaseModel):
    """The body of a request; further keys are settings of drawing, or ignored."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    prompt: str = ""
    model: str | None = None
    n: Annotated[int, Field(ge=1, le=10)] = 1
    size: Annotated[str, Field(pattern=r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$")] = "auto"
    response_format: Literal["url", "b64_json"] | None = None
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: Annotated[int, Field(ge=0, le=100)] = 100
    background: Literal["auto", "opaque"] = "auto"
    stream: bool = False
    partial_images: Annotated[int, Field(ge=0, le=3)] = 0
    user: str | None = None

    @property
    def is_file(self) -> bool:
        """Whether the answer names the folder's file, a PNG."""
        return self.response_format == "url" and not self.stream

    def settings(self) -> tuple[dict[str, Any], list[str]]:
        """The settings of drawing, and the keys that are ignored."""
        extra = self.model_extra or {}
        if "num_images" in extra:
            raise ConfigError("the number of pictures is n, not num_images")
        known = {name: value for name, value in extra.items() if name in {*Request.model_fields, "preset"}}
        settings: dict[str, Any] = {"prompt": self.prompt, "num_images": self.n, **known}
        if self.size != "auto":
            if both := sorted({"width", "height"} & known.keys()):
                raise ConfigError(f"give size or {both[0]}, not both")
            settings["width"], settings["height"] = map(int, self.size.split("x"))
        unused = {
            "user": True,
            "output_format": self.is_file and self.output_format != "png",
            "output_compression": self.is_file or self.output_format == "png",
            "partial_images": not self.stream,
            "response_format": self.stream and self.response_format == "url",
        }
        left_out = {name for name, is_unused in unused.items() if is_unused and name in self.model_fields_set}
        return settings, sorted(({*extra} - {*known}) | left_out)


def routes(studio: Studio) -> APIRouter:
    """The routes under /v1."""
    router = APIRouter()

    @router.get("/v1/models")
    def models() -> dict[str, Any]:
        facts = {"object": "model", "created": 0, "owned_by": "latentdiff"}
        return {"object": "list", "data": [{"id": name} | facts for name in studio.shelf.names()]}

    @router.post("/v1/images/generations")
    async def generations(body: Body, http: HttpRequest) -> Response:
        if not body.prompt.strip():
            raise ConfigError("prompt is empty. Say what to draw")
        return await _answered(studio, body, http, "image_generation")

    @router.post("/v1/images/edits")
    async def edits(http: HttpRequest) -> Response:
        body, files = await _form(http)
        pictures = files.get("image", []) + files.get("image[]", [])
        if len(pictures) != 1:
            raise ConfigError(f"image must be one picture; this model draws over one (got {len(pictures)})")
        image = await run_in_threadpool(read_picture, pictures[0], "image")
        transparent = await run_in_threadpool(transparent_parts, files.get("mask", pictures)[0], "mask")
        if "mask" in files and not transparent.any():
            raise ConfigError("the mask has no transparent part: nothing would be drawn")
        mask = transparent if transparent.any() else None
        return await _answered(studio, body, http, "image_edit", image=image, mask=mask)

    @router.post("/v1/images/variations")
    async def variations(http: HttpRequest) -> Response:
        body, files = await _form(http, strength=VARIED)
        if len(files.get("image", [])) != 1:
            raise ConfigError(f"image must be one picture (got {len(files.get('image', []))})")
        image = await run_in_threadpool(read_picture, files["image"][0], "image")
        return await _answered(studio, body, http, "image_variation", image=image)

    return router


async def _form(http: HttpRequest, **defaults: Any) -> tuple[Body, dict[str, list[bytes]]]:
    """The fields and the files of a multipart body. Raises pydantic's ValidationError."""
    files: dict[str, list[bytes]] = {}
    fields = defaults
    async with http.form(max_files=17, max_fields=100) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                files.setdefault(name, []).append(await value.read())
            else:
                fields[name] = _as_json(name, str(value))
    return Body.model_validate(fields), files


def _as_json(name: str, text: str) -> Any:
    """A form's text as the setting's value: numbers and booleans are written as in JSON."""
    if name in ("prompt", "negative_prompt", "model", "size", "user"):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


async def _answered(studio: Studio, body: Body, http: HttpRequest, kind: str, **changes: Any) -> Response:
    """Draw, and answer whole or as a stream. changes: what drawing starts from, see Order."""
    names = studio.shelf.names()
    if body.model not in (None, *names, *ALIASES):
        return failure(404, str(studio.shelf.unknown(body.model)), "model_not_found")
    settings, unused = body.settings()
    previews = body.partial_images if body.stream else 0
    model = body.model if body.model in names else None
    ticket = await studio.submit(Order(settings, client_of(http), model, previews=previews, **changes))
    headers = ignored(unused)
    if body.stream:
        return StreamingResponse(_streamed(body, ticket, kind), media_type="text/event-stream", headers=headers)
    pictures: dict[int, dict[str, Any]] = {}
    async for event in finished_pictures(ticket, http.is_disconnected):
        pictures[event.number] = await run_in_threadpool(_item, body, event, str(http.base_url))
    data = [pictures[number] for number in sorted(pictures)]
    facts = _facts(body, event.image) | {"usage": USAGE}
    return JSONResponse({"created": int(time.time()), "data": data, **facts}, headers=headers)


def _facts(body: Body, image: Image.Image) -> dict[str, Any]:
    """What an answer says about its pictures."""
    kind = "png" if body.is_file else body.output_format
    size = f"{image.width}x{image.height}"
    return {"size": size, "quality": "auto", "background": "opaque", "output_format": kind}


def _item(body: Body, event: FinishedPicture, base: str) -> dict[str, Any]:
    if body.is_file:
        return {"url": f"{base}pictures/{event.kept.name}"}
    return {"b64_json": _encoded(body, event)}


def _encoded(body: Body, event: FinishedPicture | Preview) -> str:
    """In base64: a preview, or the folder's file, encoded anew with its record if another format is asked for."""
    if isinstance(event, FinishedPicture) and body.output_format == "png":
        return to_base64(event.kept.png)
    record = event.record if isinstance(event, FinishedPicture) else None
    has_quality = body.output_format in _LOSSY and "output_compression" in body.model_fields_set
    quality, suffix = body.output_compression if has_quality else None, f".{body.output_format}"
    try:
        data = encoded(event.image, suffix, record, quality)
    except DataError:  # the record is too long for a JPEG; the file in the folder has it
        data = encoded(event.image, suffix, None, quality)
    return to_base64(data)


async def _streamed(body: Body, ticket: Ticket, kind: str) -> AsyncIterator[str]:
    """Server-sent events: previews of each picture, then the picture."""
    counts: dict[int, int] = {}
    try:
        async for event in ticket.events():
            if isinstance(event, Moved):
                continue
            coded = await run_in_threadpool(_encoded, body, event)
            facts = {"created_at": int(time.time()), **_facts(body, event.image), "b64_json": coded}
            if isinstance(event, Preview):
                number = counts[event.number] = counts.get(event.number, -1) + 1
                yield _sse(f"{kind}.partial_image", {**facts, "partial_image_index": number})
            else:
                yield _sse(f"{kind}.completed", {**facts, "usage": USAGE})
    except LatentDiffError as error:
        yield _sse("error", {"error": {"message": str(error), "type": "server_error", "param": None, "code": None}})


def _sse(kind: str, facts: dict[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **facts})}\n\n"
