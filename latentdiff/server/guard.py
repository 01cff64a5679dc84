"""What is refused before a route sees it: foreign hosts and origins, wrong tokens, bodies that are too large or slow.

A page of another site can send requests to a server on this machine, and a name that it controls can be made to lead
here (DNS rebinding). So the Host must be one of ours, and an Origin must be the Host itself. No CORS header is ever
sent.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
TYPES = ("application/json", "multipart/form-data")
OPEN = ("/health",)  # needs no token
TOO_LARGE = 413
ALWAYS = ((b"x-content-type-options", b"nosniff"), (b"cross-origin-resource-policy", b"same-origin"))


@dataclass(frozen=True)
class Limits:
    """The limits of a request: bytes of its body, and seconds until the body has arrived."""

    body: int = 64 * 2**20
    seconds: float = 30.0


class Guard:
    """An ASGI application around another one. hosts: allowed names, without ports; None: any, behind a token."""

    def __init__(self, app: Any, hosts: tuple[str, ...] | None, token: str | None, limits: Limits):
        self._app, self._hosts, self._token, self._limits = app, hosts, token, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the module."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if refusal := self._refusal(scope, headers):
            await _drain(receive)
            await _answer(send, *refusal)
            return
        body = await self._body(receive, headers)
        if isinstance(body, tuple):
            if body[0] == TOO_LARGE:
                await _drain(receive)
            await _answer(send, *body)
            return
        await self._app(scope, _again(body, receive), _with_headers(send))

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        host = headers.get("host", "").lower()
        if self._hosts is not None and _name(host) not in self._hosts:
            return 403, "this Host is not served here"
        origin = headers.get("origin")
        is_page = scope["path"] == "/" and headers.get("sec-fetch-mode") == "navigate"  # a link that leads here
        is_foreign = headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not is_page
        if is_foreign or (origin is not None and (_netloc(origin) or "").lower() != host):
            return 403, "requests of other sites are refused"
        if self._token and scope["path"] not in OPEN and not self._is_known(headers.get("authorization", "")):
            return 401, "a token is required: Authorization: Bearer TOKEN"
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and kind not in TYPES and headers.get("content-length", "0") != "0":
            return 415, f"the body must be {' or '.join(TYPES)}"
        return None

    def _is_known(self, authorization: str) -> bool:
        """Whether it holds the token: OpenAI's Bearer, or Basic with the token as the password."""
        assert self._token
        kind, _, value = authorization.partition(" ")
        if kind.lower() == "basic":
            try:
                value = base64.b64decode(value, validate=True).decode().partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                return False
        return kind.lower() in ("bearer", "basic") and hmac.compare_digest(value.encode(), self._token.encode())

    async def _body(self, receive: Receive, headers: dict[str, str]) -> bytes | tuple[int, str]:
        """The whole body, or why it is refused."""
        most = self._limits.body
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 15 or int(length) > most:
            return TOO_LARGE, f"a body has at most {most} bytes"
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._limits.seconds):
                while True:
                    message = await receive()
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        return TOO_LARGE, f"a body has at most {most} bytes"
                    if message["type"] != "http.request" or not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            return 408, f"the body did not arrive in {self._limits.seconds:g} seconds"


def is_local(host: str) -> bool:
    """Whether an address is this machine's own, which no other machine reaches."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def names_of(host: str) -> tuple[str, ...] | None:
    """The names by which a server that listens at a local address may be called; None for other addresses."""
    return (*LOOPBACK, f"[{host}]" if ":" in host else host) if is_local(host) else None


def _netloc(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _name(host: str) -> str:
    """A Host without its port."""
    return host[: host.index("]") + 1] if host.startswith("[") and "]" in host else host.rpartition(":")[0] or host


def _again(body: bytes, receive: Receive) -> Receive:
    """A receive that gives the body, which has been read, and then what comes after it."""
    sent = False

    async def first_the_body() -> MutableMapping[str, Any]:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return first_the_body


async def _drain(receive: Receive, most: int = 2**20, seconds: float = 2.0) -> None:
    """Read the beginning of a body that is refused: closing with unread bytes would reset the connection, and the
    client would not see why.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while most > 0:
                message = await receive()
                most -= len(message.get("body", b""))
                if message["type"] != "http.request" or not message.get("more_body"):
                    return


def _with_headers(send: Send) -> Send:
    """A send that adds the headers of every answer: types are not guessed, other sites cannot show what is here."""

    async def sent(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], *ALWAYS]
        await send(message)

    return sent


async def _answer(send: Send, status: int, message: str) -> None:
    content = json.dumps({"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}})
    headers = [(b"content-type", b"application/json"), (b"connection", b"close"), *ALWAYS]
    headers += [(b"www-authenticate", b'Basic realm="latentdiff"')] if status == 401 else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content.encode()})
