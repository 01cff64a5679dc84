"""The server as a process: it listens, draws until a signal comes, and answers what is open before it ends."""

from __future__ import annotations

import asyncio
import socket
import webbrowser
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from latentdiff.core.errors import ResourceError
from latentdiff.server.app import application
from latentdiff.server.studio import Studio

IDLE = 15  # seconds after which a connection without a request is closed
CLOSING = 10  # seconds for answers that are on their way


class _Impatient(H11Protocol):
    """uvicorn's HTTP, which also closes connections that send no request, or a part of one, for a while."""

    _last: Any = None  # the request that was the latest one a while ago

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        super().connection_made(transport)
        self.loop.call_later(IDLE, self._close_unused)

    def _close_unused(self) -> None:
        if self.transport.is_closing():
            return
        is_answered = self.cycle is None or self.cycle.response_complete
        if is_answered and self.cycle is self._last:
            self.transport.close()
            return
        self._last = self.cycle
        self.loop.call_later(IDLE, self._close_unused)


class _Server(uvicorn.Server):
    """uvicorn's, which tells the worker to stop as soon as a signal comes: open requests are then answered by 503.

    address: is opened in a browser as soon as the server listens.
    """

    def __init__(self, config: uvicorn.Config, studio: Studio, address: str | None):
        super().__init__(config)
        self._studio, self._address = studio, address

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        await super().startup(sockets)
        if self._address is not None and self.started:
            await asyncio.to_thread(webbrowser.open, self._address)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._studio.worker.stop(wait=0)
        super().handle_exit(sig, frame)


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens at an address. Raises ResourceError."""
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048
        )
    except OSError as error:
        raise ResourceError(f"cannot listen at {host}, port {port} ({error.strerror}). Try another --port") from None


def serve(
    studio: Studio,
    listener: socket.socket,
    hosts: tuple[str, ...] | None,
    token: str | None,
    address: str | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM, which uvicorn raises again when all is closed. hosts: see Guard."""
    config = uvicorn.Config(
        application(studio, hosts, token),
        http=_Impatient,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=IDLE,
        timeout_graceful_shutdown=CLOSING,
        limit_concurrency=512,
    )
    studio.worker.start()
    try:
        _Server(config, studio, address).run([listener])
    finally:
        studio.worker.stop()
