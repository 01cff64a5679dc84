"""The training runs of a folder, for the page: states, curves, and the pictures of validations as they come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import FileResponse, Response

from latentdiff.server.shelf import is_text
from latentdiff.server.studio import MissingError
from latentdiff.stages.overview import curves_of, run_folders, samples_of, state_of


def routes(folder: Path) -> APIRouter:
    """/api/runs. Names in an address are looked up among those that are there, and never joined to a path."""
    router = APIRouter(prefix="/api/runs")

    def folders() -> list[Path]:
        return [path for path in run_folders(folder) if is_text(path.name)]

    @router.get("")
    def runs() -> list[dict[str, Any]]:
        return [state_of(path) for path in folders()]

    @router.get("/{name}")
    def run(name: str) -> dict[str, Any]:
        path = _named(folders(), name)
        state = state_of(path)
        stages = {
            stage: {"curves": curves_of(path / stage), "samples": samples_of(path / stage)} for stage in state["stages"]
        }
        return {**state, "details": stages}

    @router.get("/{name}/{stage}/{sample}")
    def sample(name: str, stage: str, sample: str) -> Response:
        path = _named(folders(), name)
        place = _named([path / known for known in state_of(path)["stages"]], stage)
        return FileResponse(_named([place / "samples" / known for known in samples_of(place)], sample))

    return router


def _named(paths: list[Path], name: str) -> Path:
    for path in paths:
        if path.name == name:
            return path
    raise MissingError(f"no such run or picture ({name[:60]!r})")
