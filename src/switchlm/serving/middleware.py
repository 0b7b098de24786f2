"""Checks before every route: API key, limits on bodies; files and headers of the page.

The content security policy of the page allows no resources from other origins, and only its own
scripts, whatever text a model generates.
"""

import asyncio
import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Awaitable, Callable, MutableMapping
from importlib.resources import files
from typing import Any

from starlette.responses import JSONResponse, Response

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

LARGEST_BODY = 2**21  # bytes
LARGEST_REFUSED = (
    2**26
)  # bytes read and discarded before the response: few clients read while they send
BODY_SECONDS = 10.0  # to receive a body
OPEN = ("/", "/health")  # need no key, like the files of the page


class Guard:
    """ASGI middleware that checks the API key and reads the body before the application runs.

    key: None: no key is needed.
    seconds: for the whole body; a slower one is refused, as is a larger one than LARGEST_BODY.
    count: called with the status of every response.
    """

    def __init__(
        self,
        app: App,
        *,
        key: str | None,
        seconds: float = BODY_SECONDS,
        count: Callable[[int], None] = lambda status: None,
    ) -> None:
        self._app, self._seconds, self._count = app, seconds, count
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._count(message["status"])
            await send(message)

        if scope["type"] == "http":
            await self._respond(scope, receive, counted)
        else:
            await self._app(scope, receive, send)

    async def _respond(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        async def refuse(
            status: int, message: str, headers: dict[str, str], code: str | None = None
        ) -> None:
            response = JSONResponse(error_body(message, code=code), status, headers)
            await response(scope, receive, send)

        if not self._allowed(scope):
            message = "An API key is needed: send it as `Authorization: Bearer KEY`."
            await refuse(401, message, {"WWW-Authenticate": "Bearer"}, "invalid_api_key")
            return
        close = {"Connection": "close"}
        try:
            body = await asyncio.wait_for(_read(receive), self._seconds)
        except TimeoutError:
            await refuse(408, f"The body was not received within {self._seconds:g} s.", close)
            return
        except OverflowError:
            await refuse(413, f"A request may have {LARGEST_BODY:,} bytes at most.", close)
            return
        if body is None:  # the client disconnected
            return
        replayed = False

        async def replay() -> Message:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    def _allowed(self, scope: MutableMapping[str, Any]) -> bool:
        if self._key is None or scope["path"] in OPEN or scope["path"].startswith("/page/"):
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, value = given.partition(b" ")
        if scheme.lower() == b"basic":  # sent by browsers for an address with a password
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
    """Return an error in the format of the OpenAI API."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
_INLINE_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)

# A report is one file with inline scripts; it may load nothing.
REPORT_HEADERS = {
    "Content-Security-Policy": (
        "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; "
        "style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def page_files(report: str | None = None) -> dict[str, Response]:
    """Return the responses at `/`, `/page/NAME`, and `/report` if there is a report.

    report: the HTML of the run's report; it needs the API key, the others do not.
    """
    found = {}
    headers = page_headers(report)
    for file in files("switchlm.serving").joinpath("page").iterdir():
        ending = file.name.rpartition(".")[2]
        if ending in _TYPES:
            address = "/" if file.name == "index.html" else f"/page/{file.name}"
            found[address] = Response(file.read_bytes(), 200, headers, _TYPES[ending])
    if report is not None:
        found["/report"] = Response(report, 200, REPORT_HEADERS, "text/html")
    return found


def page_headers(report: str | None = None) -> dict[str, str]:
    """Return the headers of every file of the page.

    report: the HTML of the run's report, if there is one. The page shows it in a sandboxed frame,
        to which the policy of the page applies, so its scripts are allowed by their hashes.
    """
    hashes = ""
    for script in _INLINE_SCRIPT.findall(report or ""):
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        hashes += f" 'sha256-{digest}'"
    return {
        "Content-Security-Policy": (
            f"default-src 'none'; script-src 'self'{hashes}; "
            "style-src 'self' 'unsafe-inline'; img-src data:; connect-src 'self'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        ),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
