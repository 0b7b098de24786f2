"""The guard alone, by the ASGI protocol: the key and the limits on bodies."""

import asyncio
import base64
import hmac
import json

import pytest

from switchlm.serving import middleware
from switchlm.serving.middleware import LARGEST_BODY, LARGEST_REFUSED, Guard

KEY = "a key of the test"
ROUTES = ("/metrics", "/v1/models", "/v1/completions", "/report", "/openapi.json", "/page", "//",
          "/health/", "/nothing", "/v1/../page/x", "*")  # fmt: skip
OPEN = ("/", "/health", "/page/page.js", "/page/nothing")


def ask(path="/v1/models", parts=(b"",), headers=(), key=KEY, seconds=5.0, slow=0.0):
    """Return (status, headers, content, the body that the application received)."""
    sent, reached, parts = [], [], list(parts)

    async def receive():
        if not parts:
            return {"type": "http.disconnect"}
        await asyncio.sleep(slow)
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(message):
        sent.append(message)

    async def app(_scope, receive, send):
        reached.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"in"})

    scope = {"type": "http", "path": path, "headers": list(headers)}
    asyncio.run(Guard(app, key=key, seconds=seconds)(scope, receive, send))
    if not sent:
        return None
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


def test_the_application_receives_the_body_in_one_message():
    assert ask(parts=(b"a", b"", b"bc"), key=None)[3] == [b"abc"]
    whole = b"x" * LARGEST_BODY
    assert ask(parts=(whole[:100], whole[100:]), key=None)[3] == [whole]


@pytest.mark.parametrize(
    "parts",
    [
        (b"x" * (LARGEST_BODY + 1),),
        (b"x" * LARGEST_BODY, b"x", b"", b"x" * 1000),
        [b"x" * LARGEST_BODY] * (LARGEST_REFUSED // LARGEST_BODY + 9),
    ],
)
def test_a_large_body_is_refused_before_the_application(parts):
    status, headers, content, reached = ask(parts=parts, key=None)
    assert (status, reached) == (413, [])
    assert headers[b"connection"] == b"close"
    assert "2,097,152 bytes" in json.loads(content)["error"]["message"]


def test_a_slow_body_is_refused():
    status, _, content, reached = ask(parts=[b"x"] * 50, slow=0.02, seconds=0.1, key=None)
    assert (status, reached) == (408, [])
    assert "0.1 s" in json.loads(content)["error"]["message"]


def test_a_client_that_disconnects_before_its_body_makes_no_request():
    assert ask(parts=(), key=None) is None
