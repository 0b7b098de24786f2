"""Run the application behind uvicorn until a signal, or until the engine ends."""

import asyncio
import math
import socket
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from switchlm.errors import SwitchLMError
from switchlm.serving.connections import Connection, Connections
from switchlm.serving.engine import Engine
from switchlm.serving.middleware import App

KEEP_ALIVE_SECONDS = 15
ENDED_SECONDS = 5  # for the last responses after the engine has ended


class EngineError(SwitchLMError):
    """The engine's thread ended with an error."""


class Server:
    """Serves an application on a listening socket.

    seconds: how long a request may take.
    limits: of connections, see Connections.
    """

    def __init__(
        self, app: App, listener: socket.socket, engine: Engine, *, seconds: float, **limits: Any
    ) -> None:
        self._engine, self._listener, self._limits = engine, listener, limits
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=H11Protocol,
                ws="none",
                loop="asyncio",
                lifespan="on",
                proxy_headers=False,
                access_log=False,
                log_level="error",  # clients cause warnings
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                # Longer than any request, but bounded: some clients never read.
                timeout_graceful_shutdown=math.ceil(seconds) + 10,
            )
        )

    def run(self) -> None:
        """Serve until SIGINT, SIGTERM or `stop`, and finish the accepted requests.

        Raises EngineError if the engine ended with an error.
        """
        self._engine.ended.add_done_callback(lambda _: self.stop(ENDED_SECONDS))
        asyncio.run(self._run())
        ended = self._engine.ended
        if ended.done() and (error := ended.exception()):
            raise EngineError(
                f"The engine ended with {type(error).__name__}: {error}. It can serve no request, "
                "so the server has stopped: start it again."
            ) from error

    @property
    def started(self) -> bool:
        return self._server.started

    def stop(self, seconds: int | None = None) -> None:
        """Let `run` return; seconds: for the accepted requests, None: as much as they may take."""
        if seconds is not None:
            self._server.config.timeout_graceful_shutdown = seconds
        self._server.should_exit = True

    async def _run(self) -> None:
        server = self._server
        serving = asyncio.create_task(server.serve(sockets=[]))
        while not (server.started or serving.done()):
            await asyncio.sleep(0.005)
        if server.started:
            connections = Connections(self._listener, self._protocol, **self._limits)
            connections.start()
            # uvicorn closes them first when it stops.
            server.servers.append(cast(asyncio.Server, connections))
        await serving

    def _protocol(self, connection: Connection) -> asyncio.Protocol:
        server = self._server
        return H11Protocol(
            config=server.config,
            server_state=server.server_state,
            app_state={**server.lifespan.state, "connection": connection},
        )
