"""What is refused before a route sees it: foreign hosts and origins, wrong tokens, bodies that are too large or slow.

A page of another site can send requests to a server on this machine, and a name that it controls can be made to lead
here (DNS rebinding). So the Host must be one of ours, and an Origin must be the Host itself. No CORS header is ever
sent.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
TYPES = ("application/json", "multipart/form-data")
OPEN = ("/health",)  # needs no token
TOO_SLOW, TOO_LARGE = 408, 413
ALWAYS = ((b"x-content-type-options", b"nosniff"), (b"cross-origin-resource-policy", b"same-origin"))


@dataclass(frozen=True)
class Limits:
    """The limits of a request: bytes of its body, and seconds until the body has arrived.

    bodies: bytes of the bodies of all requests that are being answered.
    """

    body: int = 64 * 2**20
    seconds: float = 30.0
    bodies: int = 512 * 2**20


class _RefusalError(Exception):
    """A status and a message."""


class Guard:
    """An ASGI application around another one. hosts: allowed names, without ports; None: any, behind a token.

    count: is called with the status of each refusal.
    """

    def __init__(
        self, app: Any, hosts: tuple[str, ...] | None, token: str | None, limits: Limits, count: Callable[[int], None]
    ):
        self._app, self._hosts, self._token, self._limits, self._count = app, hosts, token, limits, count
        self._held = 0  # bytes of bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the module."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self._check(scope, headers)
            with self._room_for(headers):
                body = await self._body(receive)
                await self._app(scope, _again(body, receive), _with_headers(send))
        except _RefusalError as refusal:
            status, message = refusal.args
            self._count(status)
            if status != TOO_SLOW:
                await _drain(receive)
            await _answer(send, status, message)

    def _check(self, scope: Scope, headers: dict[str, str]) -> None:
        """Raises _RefusalError for what a request's first lines say."""
        host = headers.get("host", "").lower()
        if self._hosts is not None and _name(host) not in self._hosts:
            raise _RefusalError(403, "this Host is not served here")
        origin = headers.get("origin")
        is_page = scope["path"] == "/" and headers.get("sec-fetch-mode") == "navigate"  # a link that leads here
        is_foreign = headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not is_page
        if is_foreign or (origin is not None and (_netloc(origin) or "").lower() != host):
            raise _RefusalError(403, "requests of other sites are refused")
        if self._token and scope["path"] not in OPEN and not self._is_known(headers.get("authorization", "")):
            raise _RefusalError(401, "a token is required: Authorization: Bearer TOKEN")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and kind not in TYPES and headers.get("content-length", "0") != "0":
            raise _RefusalError(415, f"the body must be {' or '.join(TYPES)}")

    def _is_known(self, authorization: str) -> bool:
        """Whether it holds the token: OpenAI's Bearer, or Basic with the token as the password."""
        assert self._token
        kind, _, value = authorization.partition(" ")
        if kind.lower() == "basic":
            try:
                value = base64.b64decode(value, validate=True).decode().partition(":")[2]
            except ValueError:  # no base64, or no text in it
                return False
        return kind.lower() in ("bearer", "basic") and hmac.compare_digest(value.encode(), self._token.encode())

    @contextmanager
    def _room_for(self, headers: dict[str, str]) -> Iterator[None]:
        """A block that may hold a body of the length that the headers state, or of any. Raises _RefusalError."""
        limits, length = self._limits, headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 15 or int(length) > limits.body:
            raise _RefusalError(TOO_LARGE, f"a body has at most {limits.body / 2**20:g} MiB")
        size = limits.body if "transfer-encoding" in headers else int(length)
        if self._held + size > limits.bodies:
            raise _RefusalError(503, "the server holds too many pictures of other requests. Ask again later")
        self._held += size
        try:
            yield
        finally:
            self._held -= size

    async def _body(self, receive: Receive) -> bytes:
        """The whole body. Raises _RefusalError."""
        parts, size, limits = [], 0, self._limits
        try:
            async with asyncio.timeout(limits.seconds):
                while True:
                    message = await receive()
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limits.body:
                        raise _RefusalError(TOO_LARGE, f"a body has at most {limits.body / 2**20:g} MiB")
                    if message["type"] != "http.request" or not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise _RefusalError(TOO_SLOW, f"the body did not arrive in {limits.seconds:g} seconds") from None


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
