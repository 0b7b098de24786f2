"""Checks before every route: host, framing, API key; files and headers of the page.

The content security policy of the page allows no resources from other origins, and only its own
scripts, whatever text a model generates.
"""

import base64
import binascii
import hashlib
import hmac
import ipaddress
import re
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from importlib.resources import files
from typing import Any

from starlette.responses import JSONResponse, Response

from switchlm.serving.errors import error_body

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

OPEN = ("/", "/health")  # need no key, like the files of the page


class Guard:
    """ASGI middleware that checks requests before the application runs.

    key: None: no key is needed.
    hosts: names by which clients may address the server, besides those of this machine; None: any.
        A page of another origin whose name is made to point here is refused by it.
    count: called with the status of every response.
    """

    def __init__(
        self,
        app: App,
        *,
        key: str | None,
        hosts: Collection[str] | None = None,
        count: Callable[[int], None] = lambda status: None,
    ) -> None:
        self._app, self._count = app, count
        self._key = None if key is None else key.encode()
        self._hosts = None if hosts is None else {_bare(host) for host in hosts}

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        connection = scope.get("state", {}).get("connection")

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._count(message["status"])
                if connection:
                    connection.received()
            await send(message)

        async def noted() -> Message:
            message = await receive()
            if connection and not message.get("more_body", False):
                connection.received()
            return message

        if connection:
            connection.begin()
        try:
            app = self._refusal(scope) or self._app
            await app(scope, noted, counted)
        finally:
            if connection:
                connection.end()

    def _refusal(self, scope: MutableMapping[str, Any]) -> Response | None:
        headers = dict(scope["headers"])
        if b"content-length" in headers and b"transfer-encoding" in headers:
            # Servers in front may take the other one, and so another end of the request.
            message = "Send Content-Length or Transfer-Encoding, not both."
            return JSONResponse(error_body(message), 400, {"Connection": "close"})
        if not self._is_ours(headers.get(b"host")):
            message = (
                "This server has another name. Add the one you use with --allow-host, if it is "
                "reached by that name."
            )
            return JSONResponse(error_body(message), 421)
        if not self._allowed(scope):
            message = "An API key is needed: send it as `Authorization: Bearer KEY`."
            body = error_body(message, code="invalid_api_key")
            return JSONResponse(body, 401, {"WWW-Authenticate": "Bearer"})
        return None

    def _is_ours(self, header: bytes | None) -> bool:
        """Return whether a Host header names this server; all browsers send one."""
        if self._hosts is None or header is None:
            return True
        host = _bare(header.decode("latin-1"))
        return host in self._hosts or _is_loopback(host)

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


def _bare(host: str) -> str:
    """Return a host without its port and final dot, in lower case."""
    without_port = re.sub(r"(?<=[^:]):\d*$", "", host)
    return without_port.rstrip(".").lower()


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False


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
