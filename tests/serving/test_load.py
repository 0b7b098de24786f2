"""Many clients at a time: refused, disconnected, counted."""

import asyncio
import contextlib
import random
import socket
import threading
from collections import Counter

import httpx
import pytest

LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=None)


def clients(served):
    return httpx.AsyncClient(base_url=served.address, limits=LIMITS, timeout=120)


def test_200_clients_against_a_queue_of_32(serve):
    served = serve(num_slots=8, queue=32)

    async def ask(client):
        return await client.post("/v1/completions", json={"prompt": "hello", "max_tokens": 40})

    async def watch(client):
        while True:
            assert (await client.get("/health")).status_code == 200
            await asyncio.sleep(0.02)

    async def run():
        async with clients(served) as client:
            watching = asyncio.create_task(watch(client))
            found = await asyncio.gather(*(ask(client) for _ in range(200)))
            watching.cancel()
            return found

    found = asyncio.run(run())
    by_status = Counter(answer.status_code for answer in found)
    assert set(by_status) == {200, 429}
    assert by_status[200] >= 32
    texts = {answer.json()["choices"][0]["text"] for answer in found if answer.is_success}
    assert len(texts) == 1
    for answer in found:
        if answer.status_code == 429:
            assert 1 <= int(answer.headers["Retry-After"]) <= 600
            assert "busy" in answer.json()["error"]["message"]
    counted = served.metrics()
    assert counted['switchlm_requests_total{outcome="length"}'] == by_status[200]
    assert counted['switchlm_requests_total{outcome="refused"}'] == by_status[429]
    assert counted["switchlm_waiting_requests"] == counted["switchlm_active_requests"] == 0


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_disconnect_free_their_slots(serve, soon, stream):
    disconnect(serve(num_slots=8, queue=256, max_target=4096), soon, 40, stream)


def disconnect(served, soon, number, stream):
    """Start many long requests, disconnect, and check that their slots are free."""
    engine, asked = served.engine, threading.Event()
    body = {"prompt": "hello", "max_tokens": engine.max_target, "stream": stream}

    async def leave(client):
        if stream:
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                async for _ in answer.aiter_text():
                    break
        else:
            await client.post("/v1/completions", json=body)

    async def run():
        async with clients(served) as client, asyncio.timeout(60):
            going = [asyncio.create_task(leave(client)) for _ in range(number)]
            while engine.num_waiting < number:
                await asyncio.sleep(0.002)
            asked.set()
            while not engine.num_active:
                await asyncio.sleep(0.002)
            for task in going:
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(*going)

    engine.call(asked.wait)  # no request is served before all are sent
    try:
        asyncio.run(run())
    finally:
        asked.set()
    soon(lambda: engine.num_active == 0 and engine.num_waiting == 0)
    cancelled = engine.statistics.value("switchlm_requests_total", outcome="cancelled")
    assert cancelled == number, engine.statistics.text({})
    found = served.metrics()
    assert found["switchlm_waiting_requests"] == found["switchlm_active_requests"] == 0


def mixed_requests(served, number, seed=0):
    """Send mixed requests; return the clients' own counts."""
    draw, counts = random.Random(seed), Counter()

    async def one(client, kind, limit):
        body = {"prompt": "hello", "max_tokens": limit}
        if kind == "bad":
            answer = await client.post("/v1/completions", json={**body, "max_tokens": -1})
            assert answer.status_code == 400
            counts[400] += 1
            return
        if kind == "gone":
            async with client.stream(
                "POST",
                "/v1/completions",
                json={**body, "max_tokens": served.engine.max_target, "stream": True},
            ) as answer:
                counts[answer.status_code] += 1
                if answer.status_code == 200:
                    async for _ in answer.aiter_text():
                        break
            counts["refused" if answer.status_code == 429 else "cancelled"] += 1
            return
        if kind == "fill":
            body = {"text": "a <extra_id_0>", "max_tokens": limit}
        answer = await client.post(f"/v1/{'fill' if kind == 'fill' else 'completions'}", json=body)
        counts[answer.status_code] += 1
        if answer.status_code == 429:
            counts["refused"] += 1
            return
        assert answer.status_code == 200
        counts["length"] += 1
        counts["new"] += answer.json()["usage"]["completion_tokens"]
        counts["prompt"] += answer.json()["usage"]["prompt_tokens"]

    async def worker(client, work):
        while work:
            await one(client, *work.pop())

    async def run():
        kinds = draw.choices(["plain", "fill", "bad", "gone"], [6, 2, 1, 1], k=number)
        work = [(kind, draw.randrange(1, 12)) for kind in kinds]
        async with clients(served) as client:
            await asyncio.gather(*(worker(client, work) for _ in range(24)))

    asyncio.run(run())
    return counts


def check_counts(served, number, soon):
    counts = mixed_requests(served, number)
    soon(lambda: served.engine.num_active == 0 and served.engine.num_waiting == 0)
    found = served.metrics()
    for outcome in ("length", "cancelled", "refused"):
        assert found[f'switchlm_requests_total{{outcome="{outcome}"}}'] == counts[outcome], outcome
    for status in (200, 400, 429):
        assert found[f'switchlm_http_responses_total{{status="{status}"}}'] == counts[status]
    for outcome in ("stop", "error", "deadline"):
        assert found[f'switchlm_requests_total{{outcome="{outcome}"}}'] == 0
    # Clients that disconnected counted no tokens; the server has counted theirs too.
    assert found["switchlm_new_tokens_total"] >= counts["new"]
    assert found["switchlm_request_seconds_count"] == counts["length"] + counts["cancelled"]
    assert found["switchlm_waiting_requests"] == found["switchlm_active_requests"] == 0
    assert min(counts["length"], counts["cancelled"], counts["refused"]) > 0


def test_the_server_and_its_clients_count_the_same(serve, soon):
    check_counts(serve(num_slots=4, queue=12, max_target=4096), 150, soon)


def test_a_client_that_never_reads_does_not_block_others(serve):
    served = serve(num_slots=2, max_target=64)
    body = b'{"prompt": "hello", "max_tokens": 64, "stream": true}'
    address = httpx.URL(served.address)
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            stalled = stack.enter_context(socket.create_connection((address.host, address.port)))
            stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            head = (
                "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            stalled.sendall(head.encode() + body)
            unfinished = stack.enter_context(socket.create_connection((address.host, address.port)))
            unfinished.sendall(b"POST /v1/completions HTTP/1.1\r\nHost:")  # and nothing more
        answer = httpx.post(
            f"{served.address}/v1/completions", json={"prompt": "hello", "max_tokens": 8}
        )
        assert answer.status_code == 200
        assert served.engine.num_active <= 2


@pytest.mark.slow
@pytest.mark.parametrize("stream", [True, False])
def test_200_clients_that_disconnect_free_their_slots(serve, soon, stream):
    served = serve(num_slots=32, queue=256, max_target=512)
    disconnect(served, soon, 200, stream)


@pytest.mark.slow
def test_the_server_and_its_clients_count_the_same_for_1000_requests(serve, soon):
    check_counts(serve(num_slots=4, queue=12, max_target=4096), 1000, soon)
