"""The pictures that were drawn: as files, as a history that can be searched, and their settings read back."""

from __future__ import annotations

from collections.abc import Set
from datetime import date, datetime, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Body, Query
from fastapi.responses import Response

from latentdiff.drawing.record import read_metadata_of
from latentdiff.drawing.reproduce import Record, record_in
from latentdiff.server.history import LATEST, Search
from latentdiff.server.studio import MissingError, Studio, from_base64

TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}
Words = Annotated[str, Query(max_length=200)]
Place = Annotated[str, Query(pattern=r"^-?\d{1,18}-\d{1,18}$")]


def routes(studio: Studio) -> APIRouter:
    """/pictures and /api/history."""
    router = APIRouter()

    @router.api_route("/pictures/{name}", methods=["GET", "HEAD"])
    def picture(name: str) -> Response:
        path = studio.path_of(name)
        if path is None:
            raise MissingError("no such picture was drawn here")
        return Response(path.read_bytes(), media_type=TYPES[path.suffix], headers={"cache-control": "no-store"})

    @router.get("/api/history")
    def history(
        words: Words = "",
        model: Words = "",
        since: date | None = None,
        until: date | None = None,
        before: Place | None = None,
        count: Annotated[int, Query(ge=1, le=200)] = 60,
    ) -> dict[str, Any]:
        start = -LATEST if since is None else _beginning(since)
        end = LATEST if until is None or until == date.max else _beginning(until + timedelta(days=1)) - 1
        search = Search(words, model, start, end, (LATEST, 0) if before is None else _place(before), count)
        rows = [
            {
                "name": each.name,
                "place": "-".join(map(str, each.place)),
                "record": summary(each.record, studio.shelf.own),
            }
            for each in studio.history.search(search)
        ]
        return {"pictures": rows, "models": studio.history.models()}

    @router.post("/api/read")
    def read(image: Annotated[str, Body(embed=True)]) -> dict[str, Any]:
        """The settings of a client's picture; of other programs' pictures their text."""
        metadata = read_metadata_of(from_base64(image), "the picture", decoded=False)
        record = summary(record_in(metadata, "the picture"), studio.shelf.own) if "latentdiff" in metadata else None
        return {"record": record, "parameters": metadata.get("parameters")}

    return router


def _beginning(day: date) -> int:
    """When a day begins in this machine's time zone, microseconds; -LATEST or LATEST beyond the clock's range."""
    try:
        return int(datetime(day.year, day.month, day.day).timestamp() * 1e6)
    except (OverflowError, ValueError, OSError):
        return -LATEST if day.year < 1970 else LATEST


def _place(text: str) -> tuple[int, int]:
    changed, _, number = text.rpartition("-")
    return int(changed), int(number)


def summary(record: Record, own: Set[str] = frozenset()) -> dict[str, Any]:
    """What the page shows of a record: the settings that draw this picture alone, and how it was drawn.

    Seeds are text: a browser's numbers have 53 bits. own: hashes of adapters that belong to the model, see Shelf.
    """
    settings = record.request.model_dump() | {"num_images": 1}
    varied = record.request.variation_seed
    settings["seed"] = str(record.request.seed if varied is not None else record.seed)
    if varied is not None:
        settings["variation_seed"] = str(varied + record.index)
    loras = [source for source in record.sources if source.kind in ("lora", "merged")]
    adapters = [source for source in loras if source.sha256 not in own]
    return {
        "settings": settings,
        "model": record.model,
        "hash": record.model_hash,
        "size": [record.width, record.height],
        "adapters": [{"name": source.path, "weight": source.weight} for source in adapters],
        "from_picture": record.canvas is not None,
    }
