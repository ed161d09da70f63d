"""The HTTP server, which lets those who follow jobs go before it waits for open connections.

Knows uvicorn and how it is set up here. Without this a stream would keep a server that is told to stop until its
patience ends.
"""

from __future__ import annotations

import socket

import uvicorn
from fastapi import FastAPI

from impasto.api.protocol import GuardedProtocol
from impasto.config import Settings

DRAIN_SECONDS = 5  # for requests in progress at shutdown


def server_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """Return how the application is served: with our limits and our log format, and no access log.

    There is no access log because a picture's URL is all that protects it. Proxies' headers are read by
    ``api/edge.py``, which knows which proxies are trusted.
    """
    return uvicorn.Config(
        app,
        http=GuardedProtocol,
        ws="none",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=settings.max_connections,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )


class Server(uvicorn.Server):
    """uvicorn's server for one of our applications.

    Args:
        app: From ``create_app``.
        config: With that application in it.
    """

    def __init__(self, app: FastAPI, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the streams and waits, then as always: no new connections, and the open requests to their end."""
        self._app.state.service.listeners.close()
        await super().shutdown(sockets)
