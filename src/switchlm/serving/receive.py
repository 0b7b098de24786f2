"""Receive the bodies of requests: bounded in bytes, in time, and all of them together."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import Request

from switchlm.serving.requests import RequestError

LARGEST_BODY = 2**21  # bytes
# Bytes read and discarded before the response: few clients read while they send.
LARGEST_REFUSED = 2**26
BODY_SECONDS = 10.0
SMALL_BODY = 2**16  # bytes; the number of connections bounds how many there are
MEMORY = 2**26  # bytes, of all larger bodies that are not parsed yet
CLOSE = {"Connection": "close"}


class Bodies:
    """Receives the bodies of one server.

    seconds: to receive a body.
    memory: bytes that all bodies of more than SMALL_BODY may take together.
    """

    def __init__(self, *, seconds: float = BODY_SECONDS, memory: int = MEMORY) -> None:
        self._seconds, self._free = seconds, memory

    @asynccontextmanager
    async def receive(self, request: Request) -> AsyncIterator[bytearray]:
        """Receive the body of a request, which counts as memory in use within the context.

        Raises RequestError if the body is too large, too slow, or has no room beside the others,
        or if the client disconnects.
        """
        content_type = request.headers.get("content-type", "")
        media_type = content_type.partition(";")[0].strip().lower()
        if media_type != "application/json" and not media_type.endswith("+json"):
            message = "Send JSON, with the header `Content-Type: application/json`."
            raise RequestError(message, 415)
        body = bytearray()
        try:
            try:
                async with asyncio.timeout(self._seconds):
                    await self._fill(body, request)
            except TimeoutError:
                message = f"The body was not received within {self._seconds:g} s."
                raise RequestError(message, 408, headers=CLOSE) from None
            yield body
        finally:
            self._free += _counted(body)

    async def _fill(self, body: bytearray, request: Request) -> None:
        size, more = 0, True
        while more:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise RequestError("The client closed the connection.", 499)
            part, more = message.get("body", b""), message.get("more_body", False)
            size += len(part)
            before = _counted(body)
            if size <= LARGEST_BODY:
                body += part
            else:
                body.clear()
            self._free += before - _counted(body)
            if size > (LARGEST_REFUSED if more else LARGEST_BODY):
                text = f"A request may have {LARGEST_BODY:,} bytes at most."
                raise RequestError(text, 413, headers=CLOSE)
            if self._free < 0 and _counted(body):
                text = "The server is receiving too many large requests. Try again in 1 s."
                raise RequestError(text, 503, headers=CLOSE | {"Retry-After": "1"})


def _counted(body: bytearray) -> int:
    return len(body) if len(body) > SMALL_BODY else 0
