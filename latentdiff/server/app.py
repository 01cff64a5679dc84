"""The application: routes behind the guard, errors in one form, health and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import generate_latest
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from latentdiff.core.errors import LatentDiffError
from latentdiff.server import a1111, a1111_facts, controls, gallery, openai, page, runs
from latentdiff.server.answers import failure, status_of
from latentdiff.server.guard import Guard, Limits
from latentdiff.server.studio import Studio
from latentdiff.server.work import as_ours
from latentdiff.settings.validation import first_fault


def application(studio: Studio, hosts: tuple[str, ...] | None, token: str | None, limits: Limits | None = None) -> Any:
    """The ASGI application. hosts: see Guard; None requires a token."""
    app = FastAPI(title="latentdiff", docs_url=None, redoc_url=None, openapi_url=None)
    for router in (
        openai.routes(studio),
        a1111.routes(studio),
        a1111_facts.model_routes(studio),
        a1111_facts.list_routes(),
        controls.routes(studio),
        a1111_facts.tool_routes(),
        gallery.routes(studio),
        page.routes(studio),
        runs.routes(studio.runs),
    ):
        app.include_router(router)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": studio.shelf.current, "waiting": studio.worker.waiting}

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(generate_latest(studio.registry), media_type="text/plain; version=0.0.4")

    def count(status: int) -> None:
        studio.refused.labels(str(status)).inc()

    def refused(http: Request, status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
        count(status)
        return failure(status, message, path=http.url.path, headers=headers)

    @app.exception_handler(LatentDiffError)
    async def _ours(http: Request, error: LatentDiffError) -> JSONResponse:
        return refused(http, status_of(error), str(error))

    @app.exception_handler(RequestValidationError)
    @app.exception_handler(ValidationError)
    async def _invalid(http: Request, error: RequestValidationError | ValidationError) -> JSONResponse:
        fault = first_fault(error)
        key = ".".join(part for part in fault.path if part != "body") or "the body"
        return refused(http, 422, f"{key[:80]}: {fault.message[:200]}")

    @app.exception_handler(HTTPException)
    async def _http(http: Request, error: HTTPException) -> JSONResponse:
        return refused(http, error.status_code, str(error.detail), error.headers)

    @app.exception_handler(Exception)  # which the server logs, with its traceback
    async def _foreign(http: Request, error: Exception) -> JSONResponse:
        return refused(http, 500, str(as_ours(error)))

    return Guard(app, hosts, token, limits or Limits(), count)
