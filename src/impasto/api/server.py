"""The HTTP server, which lets those who follow jobs go before it waits for open connections.

Knows uvicorn. Without this a stream would keep a server that is told to stop until its patience ends.
"""

from __future__ import annotations

import socket

import uvicorn
from fastapi import FastAPI


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
