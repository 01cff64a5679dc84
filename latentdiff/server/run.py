"""The server as a process: it listens, draws until a signal comes, and answers what is open before it ends."""

from __future__ import annotations

import asyncio
import webbrowser
from socket import socket
from types import FrameType

import uvicorn

from latentdiff.server.app import application
from latentdiff.server.guard import LOOPBACK
from latentdiff.server.studio import Studio

IDLE = 15  # seconds after which a connection without a request is closed
CLOSING = 10  # seconds for answers that are on their way


class _Server(uvicorn.Server):
    """uvicorn's, which tells the worker to stop as soon as a signal comes: open requests are then answered by 503.

    address: is opened in a browser as soon as the server listens.
    """

    def __init__(self, config: uvicorn.Config, studio: Studio, address: str | None):
        super().__init__(config)
        self._studio, self._address = studio, address

    async def startup(self, sockets: list[socket] | None = None) -> None:
        await super().startup(sockets)
        if self._address is not None and self.started:
            await asyncio.to_thread(webbrowser.open, self._address)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._studio.worker.stop(wait=0)
        super().handle_exit(sig, frame)


def serve(studio: Studio, host: str, port: int, token: str | None, address: str | None = None) -> None:
    """Serve until SIGINT or SIGTERM, which uvicorn raises again when all is closed."""
    hosts = LOOPBACK if host in ("127.0.0.1", "localhost", "::1") else None
    config = uvicorn.Config(
        application(studio, hosts, token),
        host,
        port,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=IDLE,
        timeout_graceful_shutdown=CLOSING,
        limit_concurrency=512,
    )
    studio.worker.start()
    try:
        _Server(config, studio, address).run()
    finally:
        studio.worker.stop()
