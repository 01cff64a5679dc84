"""What every answer has in common: errors in one form, what was ignored, and headers.

The form is OpenAI's. A1111's clients look for a reason under `detail`, so errors on its paths have that key too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fastapi.responses import JSONResponse

from latentdiff.core.errors import ConfigError, DataError, LatentDiffError, ModelError, UnsafeError
from latentdiff.server.studio import MissingError
from latentdiff.server.work import FullError, StoppedError

DETAILED = ("/sdapi/", "/controlnet/")  # A1111's paths
LONGEST = 500  # characters of the header
_STATUSES = {FullError: 429, StoppedError: 503, MissingError: 404}
_OF_CLIENT = (ConfigError, DataError, ModelError, UnsafeError)


def failure(
    status: int, message: str, code: str | None = None, path: str = "", headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """An error. path: of the request; code: OpenAI's name of the error."""
    message = message.encode("utf-8", "backslashreplace").decode()  # of halves of surrogate pairs
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    content: dict[str, Any] = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    if path.startswith(DETAILED):
        content["detail"] = message
    wait = {"retry-after": "5"} if status == 429 else {}
    return JSONResponse(content, status, headers={**(headers or {}), **wait})


def status_of(error: LatentDiffError) -> int:
    """The HTTP status of an error of ours."""
    return _STATUSES.get(type(error), 422 if isinstance(error, _OF_CLIENT) else 500)


def ignored(names: Iterable[str]) -> dict[str, str]:
    """The header that names what a request sent and the server did without; none if that is nothing."""
    text = ", ".join("".join(c if c.isascii() and c.isprintable() else "?" for c in name[:60]) for name in names)
    return {"x-ignored": text[:LONGEST]} if text else {}
