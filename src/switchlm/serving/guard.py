"""What stands before every route: the key, and bounds on how large and how slow a body may be."""

import asyncio
import base64
import binascii
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

LARGEST_BODY = 2**21  # bytes
LARGEST_REFUSED = 2**26  # what is thrown away before the refusal: few clients read while they send
BODY_SECONDS = 10.0  # for all of a body to come
OPEN = ("/", "/health")  # besides the page's own files, which hold nothing secret


class Guard:
    """An ASGI application before another one.

    key: None lets everyone in. The body is read here, whole, before the application sees any of it,
    so nothing large or slow ever reaches it. count: called with the status of every answer.
    """

    def __init__(
        self,
        app: App,
        *,
        key: str | None,
        seconds: float = BODY_SECONDS,
        count: Callable[[int], None] | None = None,
    ) -> None:
        self._app, self._seconds, self._count = app, seconds, count
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        else:
            await self._answer(scope, receive, self._counted(send))

    def _counted(self, send: Send) -> Send:
        count = self._count
        if count is None:
            return send

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                count(message["status"])
            await send(message)

        return counted

    async def _answer(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if not self._allowed(scope):
            message = "This needs the API key: send it as `Authorization: Bearer KEY`."
            await refuse(send, 401, message, "invalid_api_key", {"WWW-Authenticate": "Bearer"})
            return
        try:
            body = await asyncio.wait_for(_read(receive), self._seconds)
        except TimeoutError:
            await refuse(send, 408, f"The body did not come within {self._seconds:g} s.")
            return
        except OverflowError:
            await refuse(send, 413, f"A request may have {LARGEST_BODY:,} bytes at most.")
            return
        if body is None:  # the client is gone
            return
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    def _allowed(self, scope: MutableMapping[str, Any]) -> bool:
        if self._key is None or scope["path"] in OPEN or scope["path"].startswith("/page/"):
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, value = given.partition(b" ")
        if scheme.lower() == b"basic":  # what a browser sends for an address with a password
            try:
                value = base64.b64decode(value, validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        elif scheme.lower() != b"bearer":
            return False
        return hmac.compare_digest(value.strip(), self._key)


async def _read(receive: Receive) -> bytes | None:
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part = message.get("body", b"")
        size += len(part)
        if size <= LARGEST_BODY:
            parts.append(part)
        else:
            parts.clear()
        more = message.get("more_body", False)
        if size > (LARGEST_REFUSED if more else LARGEST_BODY):
            raise OverflowError
        if not more:
            return b"".join(parts)


def error_body(
    message: str, kind: str = "invalid_request_error", param: str | None = None, code: Any = None
) -> dict[str, Any]:
    """Return an error as the OpenAI API has it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def refuse(
    send: Send, status: int, message: str, code: Any = None, headers: dict[str, str] | None = None
) -> None:
    """Answer with an error."""
    content = json.dumps(error_body(message, code=code)).encode()
    fields = {"content-type": "application/json", "content-length": str(len(content))}
    fields |= {"connection": "close"} if status in (408, 413) else {}
    raw = [
        (name.lower().encode(), value.encode())
        for name, value in (fields | (headers or {})).items()
    ]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": content})
