"""Bodies of requests, by the ASGI protocol: their limits."""

import asyncio

import pytest
from starlette.requests import Request

from switchlm.serving.receive import LARGEST_BODY, LARGEST_REFUSED, SMALL_BODY, Bodies
from switchlm.serving.requests import RequestError

JSON = [(b"content-type", b"application/json; charset=utf-8")]


def request(parts, slow=0.0, headers=JSON):
    parts = list(parts)

    async def receive():
        if not parts:
            return {"type": "http.disconnect"}
        await asyncio.sleep(slow)
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    return Request({"type": "http", "headers": headers}, receive)


def received(parts, bodies=None, **options):
    async def run():
        async with (bodies or Bodies()).receive(request(parts, **options)) as body:
            return bytes(body)

    return asyncio.run(run())


def test_a_body_is_the_sum_of_its_parts():
    assert received((b"a", b"", b"bc")) == b"abc"
    whole = b"x" * LARGEST_BODY
    assert received((whole[:100], whole[100:])) == whole


@pytest.mark.parametrize(
    "parts",
    [
        (b"x" * (LARGEST_BODY + 1),),
        (b"x" * LARGEST_BODY, b"x", b"", b"x" * 1000),
        [b"x" * LARGEST_BODY] * (LARGEST_REFUSED // LARGEST_BODY + 9),
    ],
)
def test_a_large_body_is_refused(parts):
    with pytest.raises(RequestError, match="2,097,152 bytes") as caught:
        received(parts)
    assert caught.value.status == 413
    assert caught.value.headers["Connection"] == "close"


def test_a_slow_body_is_refused():
    with pytest.raises(RequestError, match=r"0\.1 s") as caught:
        received([b"x"] * 50, Bodies(seconds=0.1), slow=0.02)
    assert caught.value.status == 408


def test_a_client_that_disconnects_before_its_body_makes_no_request():
    with pytest.raises(RequestError) as caught:
        received(())
    assert caught.value.status == 499


@pytest.mark.parametrize("kind", [b"", b"text/plain", b"application/x-www-form-urlencoded"])
def test_only_json_is_read(kind):
    """Pages of other origins may send other types without asking the server."""
    with pytest.raises(RequestError, match="application/json") as caught:
        received((b"{}",), headers=[(b"content-type", kind)])
    assert caught.value.status == 415


def test_large_bodies_share_a_bounded_memory_and_small_ones_do_not():
    bodies = Bodies(memory=3 * SMALL_BODY)
    large, small = b"x" * 2 * SMALL_BODY, b"x" * SMALL_BODY

    async def run():
        async with bodies.receive(request((large,))):
            with pytest.raises(RequestError, match="too many large requests") as caught:
                async with bodies.receive(request((small, b"x"))) as body:
                    pass
            assert caught.value.status == 503
            assert caught.value.headers["Retry-After"] == "1"
            for _ in range(9):
                async with bodies.receive(request((small,))) as body:
                    assert bytes(body) == small
        async with bodies.receive(request((small, b"x"))) as body:
            return len(body)

    assert asyncio.run(run()) == SMALL_BODY + 1
