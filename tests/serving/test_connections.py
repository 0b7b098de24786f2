"""Connections of silent, slow and many clients, with a small application instead of a model."""

import asyncio
import contextlib
import errno
import logging
import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from starlette.responses import PlainTextResponse

from switchlm.serving import connections
from switchlm.serving.middleware import Guard
from switchlm.serving.server import Server

GET = b"GET /%s HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST /body HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n"


async def application(scope, receive, send):
    if scope["type"] == "lifespan":
        for event in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{event}.complete"})
        return
    if scope["path"] in ("/body", "/slow"):
        while (await receive()).get("more_body"):
            pass
    if scope["path"] == "/slow":
        while (await receive())["type"] != "http.disconnect":
            pass
    content = "x" * 2**23 if scope["path"] == "/large" else "done"
    await PlainTextResponse(content)(scope, receive, send)


@pytest.fixture
def connect():
    """Serve with limits of connections; return a function that connects and sends."""
    with contextlib.ExitStack() as stack:

        def start(**limits):
            listener = socket.create_server(("127.0.0.1", 0), backlog=512)
            address, engine = listener.getsockname(), SimpleNamespace(ended=Future())
            server = Server(Guard(application, key=None), listener, engine, seconds=1, **limits)
            run = stack.enter_context(ThreadPoolExecutor(1)).submit(server.run)
            stack.callback(run.result, 30)
            stack.callback(server.stop, 1)

            def connect(data=b""):
                client = stack.enter_context(socket.create_connection(address))
                client.settimeout(30)
                client.sendall(data)
                return client

            return connect

        yield start


def rest(client):
    """Return what comes until the server closes the connection."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := client.recv(2**16):
            parts.append(part)
    return b"".join(parts)


def answers(client, data=GET % b"fast"):
    client.sendall(data)
    received = b""
    while not received.endswith(b"done"):
        received += client.recv(2**16) or b"closed, done"
    return received.startswith(b"HTTP/1.1 200 OK")


def test_silent_clients_and_half_heads_are_disconnected_in_time(connect):
    connect = connect(head_seconds=0.3)
    begin = time.monotonic()
    silent, half, used, later = connect(), connect(GET[:20]), connect(), connect()
    assert answers(used)
    assert answers(later)
    later.sendall(GET[:5])
    assert rest(silent) == b""
    assert rest(half).startswith(b"HTTP/1.1 408 ")
    assert rest(used) == b""
    assert rest(later).startswith(b"HTTP/1.1 408 ")
    assert time.monotonic() - begin < 10


def test_a_request_in_progress_may_take_longer(connect):
    connect = connect(head_seconds=0.2)
    slow, fast = connect(GET % b"slow"), connect()
    time.sleep(0.1)
    assert answers(fast)
    slow.settimeout(0.5)
    with pytest.raises(TimeoutError):
        slow.recv(1)


def test_silent_clients_make_room_for_others_and_requests_in_progress_stay(connect, caplog):
    connect = connect(most=8)
    busy = [connect(GET % b"slow") for _ in range(3)]
    kept = connect()
    assert answers(kept)
    with caplog.at_level(logging.WARNING):
        silent = [connect(data) for data in (b"", GET[:9], POST + b"1") for _ in range(10)]
        for _ in range(10):
            assert answers(connect())
    assert all(rest(client) == b"" for client in silent)
    for client in busy:
        client.settimeout(0.01)
        with pytest.raises(TimeoutError):
            client.recv(1)
    assert caplog.messages == ["All 8 connections are in use; waiting ones are closed."]


def test_a_new_client_has_time_to_send_while_others_do_not_finish(connect):
    connect = connect(most=4)
    unfinished = [connect(POST + b"1") for _ in range(4)]
    time.sleep(0.1)
    new = connect()
    unfinished += [connect(POST + b"1") for _ in range(3)]
    assert all(rest(client) == b"" for client in unfinished[:4])
    assert answers(new)


def test_with_requests_in_all_connections_more_are_refused(connect):
    connect = connect(most=3)
    busy = [connect(GET % b"slow") for _ in range(3)]
    time.sleep(0.2)
    assert b"503" in rest(connect())
    busy[0].close()
    time.sleep(0.2)
    assert answers(connect())


def test_a_client_that_does_not_read_is_disconnected(connect):
    connect = connect(write_seconds=0.5, most=1)
    client = connect()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.sendall(GET % b"large")
    time.sleep(0.1)
    assert b"503" in rest(connect())
    time.sleep(1)
    assert answers(connect())


def test_many_requests_in_one_connection_and_in_one_part(connect):
    connect = connect(head_seconds=1.0)
    client = connect((GET % b"fast" + POST + b"1234567890") * 20)
    received = b""
    while received.count(b"done") < 40:
        received += client.recv(2**16)
    assert received.count(b"HTTP/1.1 200 OK") == 40


def test_without_file_descriptors_waiting_clients_make_room(connect, caplog, monkeypatch):
    accept, failures = asyncio.SelectorEventLoop.sock_accept, []

    async def failing(loop, listener):
        if failures:
            raise OSError(failures.pop(), "Too many open files")
        return await accept(loop, listener)

    monkeypatch.setattr(asyncio.SelectorEventLoop, "sock_accept", failing)
    monkeypatch.setattr(connections, "RETRY_SECONDS", 0.01)
    connect = connect()
    silent = [connect() for _ in range(5)]
    assert answers(connect())  # all before it are accepted
    with caplog.at_level(logging.WARNING):
        failures += [errno.EMFILE] * 30
        connect()  # accepted before the failures
        assert all(rest(client) == b"" for client in silent)
        assert answers(connect())
    assert caplog.messages == ["There is no room for another connection: Too many open files."]


def test_a_body_of_two_lengths_is_refused_and_the_connection_closed(connect):
    both = b"Transfer-Encoding: chunked\r\nContent-Length: 10\r\n\r\n0\r\n\r\n"
    client = connect()(POST.replace(b"Content-Length: 10\r\n\r\n", both) + GET % b"fast")
    received = rest(client)
    assert received.startswith(b"HTTP/1.1 400 ")
    assert b"connection: close" in received.lower()
    assert received.count(b"HTTP/1.1") == 1
