"""Connections of the server: a bounded number, each with limits on its time.

A client may be silent, send half a request, or not read its response; whoever does is disconnected
after some seconds, or at once when another client needs the place. asyncio's own server accepts
without bound, and writes thousands of lines per second when there are no file descriptors left.
"""

import asyncio
import errno
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

HEAD_SECONDS = 20.0  # to send the head of a request, after connecting or after the last response
WRITE_SECONDS = 30.0  # without reading any of a response
MOST_CONNECTIONS = 1024
RESERVED_FILES = 64  # for other uses than connections
MOST_AT_ONCE = 32  # accepted in one turn of the event loop
PART = 2048  # bytes parsed at a time: chunks of one byte take 5 ms
RETRY_SECONDS = 1.0  # to accept, when there is no room
LINE_SECONDS = 60.0  # between two lines about the same event
EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 1\r\n"
    b"Content-Length: 0\r\n\r\n"
)
_TIMED_OUT = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
_log = logging.getLogger(__name__)


class Connections:
    """Accepts connections, and hands what they send to a protocol of HTTP.

    It has the methods of asyncio's servers by which uvicorn closes them.

    listener: a listening socket.
    make: returns the protocol for a connection; the application calls `begin`, `received` and
        `end` of the connection around a request.
    most: connections at a time; None: as many as there are file descriptors for.
    """

    def __init__(
        self,
        listener: socket.socket,
        make: Callable[["Connection"], asyncio.Protocol],
        *,
        most: int | None = None,
        head_seconds: float = HEAD_SECONDS,
        write_seconds: float = WRITE_SECONDS,
    ) -> None:
        self.make, self.head_seconds, self.write_seconds = make, head_seconds, write_seconds
        self.open: set[Connection] = set()
        # Those that have not sent a complete request, in the order in which they began to wait.
        self.waiting: dict[Connection, None] = {}
        self.part = bytearray(PART)
        self._most = _places() if most is None else most
        self._listener = listener
        self._said: dict[str, float] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Accept connections from now on, in the running event loop."""
        self._listener.setblocking(False)
        self._task = asyncio.create_task(self._accept())

    def close(self) -> None:
        """Accept no more connections."""
        if self._task is not None:
            self._task.cancel()
        self._listener.close()

    async def wait_closed(self) -> None:
        """Wait until no more connections are accepted."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(0)  # accepting never waits while many connect
            accepted: list[socket.socket] = []
            pause = 0.0
            try:
                accepted.append((await loop.sock_accept(self._listener))[0])
                # A turn of the loop is long while many clients send, so one is not for each.
                while len(accepted) < MOST_AT_ONCE:
                    accepted.append(self._listener.accept()[0])
            except BlockingIOError:
                pass
            except OSError as error:
                if error.errno in EXHAUSTED:
                    self._say(f"There is no room for another connection: {error.strerror}.")
                    pause = 0.01 if self._make_room() else RETRY_SECONDS
            await self._connect_all(accepted)
            if pause:
                await asyncio.sleep(pause)

    async def _connect_all(self, accepted: list[socket.socket]) -> None:
        begun: list[Awaitable[None]] = []
        for one in accepted:
            one.setblocking(False)
            if len(self.open) + len(begun) >= self._most:
                await asyncio.gather(*begun)
                begun.clear()
            if len(self.open) >= self._most:
                self._say(f"All {self._most} connections are in use; waiting ones are closed.")
                if not self._make_room():
                    with one, suppress(OSError):
                        one.send(_FULL)
                    continue
            begun.append(self._connect(one))
        await asyncio.gather(*begun)

    async def _connect(self, accepted: socket.socket) -> None:
        with suppress(OSError):
            loop = asyncio.get_running_loop()
            await loop.connect_accepted_socket(lambda: Connection(self), accepted)

    def _make_room(self) -> bool:
        """Close the connection that waits longest, one that never got a response if possible."""
        victim = next((one for one in self.waiting if not one.was_used), None)
        victim = victim or next(iter(self.waiting), None)
        if victim is None:
            return False
        victim.abort()
        return True

    def _say(self, line: str) -> None:
        now = time.monotonic()
        if now - self._said.get(line, -LINE_SECONDS) >= LINE_SECONDS:
            self._said[line] = now
            _log.warning(line)


class Connection(asyncio.BufferedProtocol):
    """One connection: passes everything on to a protocol of HTTP, and ends it in time.

    was_used: whether a request got its response.
    """

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._http = connections.make(self)
        self._transport: asyncio.Transport
        self._loop = asyncio.get_running_loop()
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._num_requests = 0
        self._has_part = self._is_paused = self.was_used = False

    def begin(self) -> None:
        """The head of a request is complete; its body has limits of its own."""
        self._num_requests += 1
        _cancel(self._head_timer)

    def received(self) -> None:
        """The request is complete: from now on the client waits for us."""
        self._connections.waiting.pop(self, None)

    def end(self) -> None:
        """The response is complete."""
        self._num_requests -= 1
        self.was_used = True
        self._await_head()

    def abort(self) -> None:
        """Close the connection at once, whatever is not sent yet."""
        self._forget()
        self._transport.abort()

    def _await_head(self) -> None:
        """Let the client send another request, if it has the response to the last one."""
        if self._num_requests or self._is_paused or self not in self._connections.open:
            return
        _cancel(self._head_timer)
        self._has_part = False
        self._connections.waiting.pop(self, None)
        self._connections.waiting[self] = None
        self._head_timer = self._loop.call_later(self._connections.head_seconds, self._head_late)

    def _head_late(self) -> None:
        if self._has_part and not self._transport.is_closing():
            self._transport.write(_TIMED_OUT)
        self.abort()

    def _forget(self) -> None:
        _cancel(self._head_timer)
        _cancel(self._write_timer)
        self._connections.open.discard(self)
        self._connections.waiting.pop(self, None)

    # Called by the transport.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._connections.open.add(self)
        self._await_head()
        self._http.connection_made(transport)

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._connections.part

    def buffer_updated(self, nbytes: int) -> None:
        self._has_part = True
        self._http.data_received(bytes(self._connections.part[:nbytes]))

    def eof_received(self) -> bool | None:
        return self._http.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        self._http.connection_lost(exc)

    def pause_writing(self) -> None:
        self._is_paused = True
        self._write_timer = self._loop.call_later(self._connections.write_seconds, self.abort)
        self._http.pause_writing()

    def resume_writing(self) -> None:
        self._is_paused = False
        _cancel(self._write_timer)
        self._http.resume_writing()
        self._await_head()


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def _places() -> int:
    """Return how many connections there are file descriptors for."""
    try:
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        used = len(os.listdir("/dev/fd"))
    except (ImportError, OSError):  # Windows has neither
        return MOST_CONNECTIONS
    if limit == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    return max(min(MOST_CONNECTIONS, limit - used - RESERVED_FILES), 1)
