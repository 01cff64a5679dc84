"""What A1111's clients ask beside pictures: options and lists, the text in a picture, a larger picture."""

from __future__ import annotations

import json
import os
from typing import Annotated, Any

from fastapi import APIRouter, Body
from fastapi.responses import JSONResponse, Response
from PIL import Image

from latentdiff.core.errors import ConfigError
from latentdiff.diffusion.grids import GRIDS, LABELS
from latentdiff.diffusion.samplers import SAMPLERS
from latentdiff.drawing.files import encoded
from latentdiff.drawing.record import read_metadata_of
from latentdiff.server.a1111 import checkpoint_named, title
from latentdiff.server.answers import ignored
from latentdiff.server.studio import Studio, from_base64, read_picture, to_base64

UPSCALERS = {"None": None, "Lanczos": Image.Resampling.LANCZOS, "Nearest": Image.Resampling.NEAREST}
ENLARGING = ("image", "upscaler_1", "resize_mode", "upscaling_resize", "upscaling_resize_w", "upscaling_resize_h")
LARGEST = 4096  # pixels of an enlarged picture's side
EMPTY = (
    "latent-upscale-modes",
    "sd-vae",
    "hypernetworks",
    "face-restorers",
    "realesrgan-models",
    "prompt-styles",
)
REFRESHED = ("refresh-loras", "refresh-checkpoints", "refresh-vae")


def model_routes(studio: Studio) -> APIRouter:
    """The model, and the options that A1111 keeps it in."""
    router = APIRouter(prefix="/sdapi/v1")

    @router.get("/options")
    def current() -> dict[str, Any]:
        name = studio.shelf.current
        return {
            "sd_model_checkpoint": title(studio, name),
            "sd_checkpoint_hash": studio.shelf.hash_of(name) or "",
            "sd_vae": "Automatic",
            "CLIP_stop_at_last_layers": 1,
            "samples_save": True,
            "samples_format": "png",
        }

    @router.post("/options")
    async def set_options(options: Annotated[dict[str, Any], Body()]) -> None:
        now = current()
        for key, value in options.items():
            if key != "sd_model_checkpoint" and now.get(key, value if value in (None, "") else None) != value:
                raise ConfigError(f"the option {key[:60]} cannot be changed here")
        checkpoint = options.get("sd_model_checkpoint")
        if checkpoint is not None:
            name = checkpoint_named(studio, checkpoint)
            await studio.model(name)  # loaded now, so that a model that cannot be loaded is never chosen
            studio.shelf.current = name

    @router.get("/sd-models")
    def models() -> list[dict[str, Any]]:
        rows = []
        for name in studio.shelf.names():
            sha256 = studio.shelf.hash_of(name)
            facts = {"model_name": name, "hash": sha256 and sha256[:10], "sha256": sha256, "filename": name}
            rows.append({"title": title(studio, name), **facts, "config": None})
        return rows

    @router.get("/loras")
    def loras() -> list[dict[str, Any]]:
        return [{"name": name, "alias": name, "path": name, "metadata": {}} for name in studio.shelf.adapters()]

    @router.get("/embeddings")
    async def embeddings() -> dict[str, Any]:
        sources = (await studio.model()).painter.sources.values()
        words = [source.word or source.path for source in sources if source.kind == "embedding"]
        return {"loaded": {word: {"step": None, "shape": 0, "vectors": 0} for word in words}, "skipped": {}}

    return router


def list_routes() -> APIRouter:
    """What may be chosen, and facts about the machine."""
    router = APIRouter(prefix="/sdapi/v1")

    @router.get("/samplers")
    def samplers() -> list[dict[str, Any]]:
        return [{"name": row.label, "aliases": [name], "options": {}} for name, row in SAMPLERS.items()]

    @router.get("/schedulers")
    def schedulers() -> list[dict[str, Any]]:
        rows = [{"name": name, "label": LABELS.get(name, name), "aliases": None} for name in GRIDS]
        return [row | {"default_rho": -1.0, "need_inner_model": False} for row in rows]

    @router.get("/upscalers")
    def upscalers() -> list[dict[str, Any]]:
        return [
            {"name": name, "model_name": None, "model_path": None, "model_url": None, "scale": 4} for name in UPSCALERS
        ]

    for name in EMPTY:
        router.add_api_route(f"/{name}", _none_of_these)
    for name in REFRESHED:
        router.add_api_route(f"/{name}", _nothing_to_do, methods=["POST"])

    @router.get("/cmd-flags")
    def flags() -> dict[str, Any]:
        return {"api": True, "listen": False}

    @router.get("/scripts")
    def scripts() -> dict[str, list[str]]:
        return {"txt2img": [], "img2img": []}

    @router.get("/memory")
    def memory() -> dict[str, Any]:
        page = os.sysconf("SC_PAGE_SIZE")
        ram = {"total": page * os.sysconf("SC_PHYS_PAGES")}
        if "SC_AVPHYS_PAGES" in os.sysconf_names:  # macOS does not have it
            ram["free"] = page * os.sysconf("SC_AVPHYS_PAGES")
            ram["used"] = ram["total"] - ram["free"]
        return {"ram": ram, "cuda": {"error": "not measured"}}

    return router


def _none_of_these() -> list[Any]:
    return []


def _nothing_to_do() -> dict[str, Any]:
    return {}


def tool_routes() -> APIRouter:
    """What is done with a client's picture alone."""
    router = APIRouter(prefix="/sdapi/v1")

    @router.post("/png-info")
    def png_info(image: Annotated[str, Body(embed=True)]) -> dict[str, Any]:
        record = read_metadata_of(from_base64(image), "image", decoded=False)
        texts = {name: text if isinstance(text, str) else json.dumps(text) for name, text in record.items()}
        return {"info": texts.get("parameters", ""), "items": texts, "parameters": {}}

    @router.post("/extra-single-image")
    def enlarge(body: Annotated[dict[str, Any], Body()]) -> Response:
        image = Image.fromarray(read_picture(from_base64(str(body.get("image", ""))), "image"))
        name = body.get("upscaler_1", "None")
        if not isinstance(name, str) or name not in UPSCALERS:
            raise ConfigError(f"unknown upscaler {str(name)[:40]!r}; one of {', '.join(UPSCALERS)}")
        resized = image if UPSCALERS[name] is None else image.resize(_enlarged(image, body), UPSCALERS[name])
        unread = sorted(name for name, value in body.items() if name not in ENLARGING and value)
        answer = {"html_info": "", "image": to_base64(encoded(resized, ".png", None))}
        return JSONResponse(answer, headers=ignored(unread))

    return router


def _enlarged(image: Image.Image, body: dict[str, Any]) -> tuple[int, int]:
    """The new (width, height): by a factor, or as given. Raises ConfigError."""
    if body.get("resize_mode", 0) == 1:
        size = body.get("upscaling_resize_w", 0), body.get("upscaling_resize_h", 0)
    else:
        factor = body.get("upscaling_resize", 2)
        if not (isinstance(factor, int | float) and 0 < factor <= 16):
            raise ConfigError("upscaling_resize must be over 0 and at most 16")
        size = round(image.width * factor), round(image.height * factor)
    if not all(isinstance(side, int) and 1 <= side <= LARGEST for side in size):
        raise ConfigError(f"the sides of an enlarged picture must be from 1 to {LARGEST} pixels")
    return size
