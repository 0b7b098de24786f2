"""The guard alone, by the ASGI protocol."""

import asyncio
import base64
import hmac
import json

import pytest

from switchlm.serving import middleware
from switchlm.serving.middleware import Guard

KEY = "a key of the test"
ROUTES = ("/metrics", "/v1/models", "/v1/completions", "/report", "/openapi.json", "/page", "//",
          "/health/", "/nothing", "/v1/../page/x", "*")  # fmt: skip
OPEN = ("/", "/health", "/page/page.js", "/page/nothing")


def ask(path="/v1/models", headers=(), key=KEY, hosts=None):
    """Return (status, headers, content, the body that the application received)."""
    sent, reached = [], []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    async def app(_scope, receive, send):
        reached.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"in"})

    scope = {"type": "http", "path": path, "headers": list(headers)}
    asyncio.run(Guard(app, key=key, hosts=hosts)(scope, receive, send))
    start, body = sent
    return start["status"], dict(start["headers"]), body["body"], reached


def bearing(value):
    return [(b"authorization", value)]


@pytest.mark.parametrize("path", ROUTES)
def test_every_other_route_needs_the_key(path):
    status, headers, content, reached = ask(path)
    assert status == 401
    assert headers[b"www-authenticate"] == b"Bearer"
    assert "API key" in json.loads(content)["error"]["message"]
    assert KEY.encode() not in content
    assert not reached
    assert ask(path, headers=bearing(b"Bearer " + KEY.encode()))[0] == 200
    assert ask(path, key=None)[0] == 200


@pytest.mark.parametrize("path", OPEN)
def test_the_page_and_health_are_open(path):
    assert ask(path)[0] == 200


@pytest.mark.parametrize(
    "value",
    [
        b"", b"Bearer", b"Bearer ", b"bearer a key of the tes", b"Bearer a key of the test!",
        b"Token a key of the test", b"a key of the test", b"Basic", b"Basic ?", b"Basic YQ",
        b"Basic \xff\xfe", b"Basic " + base64.b64encode(b"a key of the test"),
        b"Basic " + base64.b64encode(b"user:another"), b"Bearer \xff\x00",
        b"Bearer " + b"a" * 100_000,
    ],
)  # fmt: skip
def test_a_wrong_key_is_refused(value):
    assert ask(headers=bearing(value))[0] == 401


def test_a_browser_may_send_the_key_as_a_password():
    value = b"Basic " + base64.b64encode(b"anyone:" + KEY.encode())
    assert ask(headers=bearing(value))[0] == 200
    assert ask(headers=bearing(b"bearer   " + KEY.encode()))[0] == 200


def test_keys_are_compared_in_constant_time(monkeypatch):
    compared, original = [], hmac.compare_digest

    def compare(*pair):
        compared.append(pair)
        return original(*pair)

    monkeypatch.setattr(middleware.hmac, "compare_digest", compare)
    ask(headers=bearing(b"Bearer wrong"))
    assert compared == [(b"wrong", KEY.encode())]


OURS = [None, b"localhost", b"localhost:8000", b"LOCALHOST.", b"a.localhost:1", b"127.0.0.1:8000",
        b"127.1.2.3", b"[::1]:8000", b"[::1]", b"::1", b"my.name:80", b"My.Name."]  # fmt: skip
FOREIGN = [b"", b"evil.example", b"evil.example:8000", b"127.0.0.1.evil.example", b"localhost.evil",
           b"[::1].evil", b"192.168.0.1", b"0.0.0.0", b"my.name.evil", b"evil:my.name", b"\xff",
           b"localhost:80:80", b"127.1", b"2130706433"]  # fmt: skip


@pytest.mark.parametrize("host", [*OURS, *FOREIGN], ids=str)
def test_a_server_with_names_answers_to_those_and_to_the_machine_s_own(host):
    """A page of a foreign name that is made to point here would be of the server's own origin."""
    headers = [] if host is None else [(b"host", host)]
    status, _, _, reached = ask(headers=headers, key=None, hosts=["My.name:80"])
    assert status == (200 if host in OURS else 421)
    assert bool(reached) == (host in OURS)
    assert ask(headers=headers, key=None)[0] == 200
