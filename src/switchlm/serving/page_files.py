"""The page as a server gives it: every file with its address, media type and headers.

The page may load nothing from elsewhere and run nothing but its own scripts, whatever a model
writes: its content security policy says so to the browser.
"""

import base64
import hashlib
import re
from dataclasses import dataclass
from importlib.resources import files

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
_INLINE_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)

# A report is one file with its scripts inside; alone in a window it may not reach anything.
REPORT_HEADERS = {
    "Content-Security-Policy": (
        "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; "
        "style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True, kw_only=True)
class PageFile:
    """media_type: with the character set, for the Content-Type header."""

    media_type: str
    content: bytes


def page_files() -> dict[str, PageFile]:
    """Return the page's files by address: `/` and `/page/NAME`. None needs the API key."""
    found = {}
    for file in files("switchlm.serving").joinpath("page").iterdir():
        ending = file.name.rpartition(".")[2]
        if ending in _TYPES:
            address = "/" if file.name == "index.html" else f"/page/{file.name}"
            media_type = f"{_TYPES[ending]}; charset=utf-8"
            found[address] = PageFile(media_type=media_type, content=file.read_bytes())
    return found


def page_headers(report: str | None = None) -> dict[str, str]:
    """Return the headers of every file of the page.

    report: the HTML of the run's report, if there is one. The page shows it in a frame of its own,
    which is walled off but under the page's policy, so its scripts are allowed by their hashes.
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
