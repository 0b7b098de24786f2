"""Threads that tokenize texts: a text that takes for ever costs one of them, not the server."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from switchlm.serving import texts
from switchlm.serving.texts import Threads


@pytest.fixture
def stuck(monkeypatch):
    """Let texts that begin with `stop` be tokenized until the returned function is called."""
    monkeypatch.setattr(texts, "STUCK_SECONDS", 0.2)
    over = threading.Event()

    def slow(tokenizer):
        encode = tokenizer.encode

        def wait(text):
            if text.startswith("stop"):
                over.wait()
            return encode(text)

        monkeypatch.setattr(tokenizer, "encode", wait)
        return over.set

    yield slow
    over.set()


def ask(address, text):
    body = {"prompt": text, "max_tokens": 2}
    return httpx.post(f"{address}/v1/completions", json=body, timeout=30).status_code


def test_texts_that_take_for_ever_leave_the_others(serve, stuck):
    served = serve(seconds=1.0)
    stuck(served.engine.tokenizer)
    with ThreadPoolExecutor(4) as clients:
        assert set(clients.map(lambda _: ask(served.address, "stop"), range(4))) == {504}
    assert ask(served.address, "go") == 200
    assert httpx.get(f"{served.address}/health").status_code == 200


def test_too_many_of_them_are_no_end_but_no_health_until_they_are_done(serve, stuck, soon):
    served = serve(seconds=2.0)
    end = stuck(served.engine.tokenizer)
    assert ask(served.address, "go") == 200
    before = threading.active_count()
    number = texts.MOST_STUCK + texts.NUM_THREADS
    with ThreadPoolExecutor(number) as clients:
        assert set(clients.map(lambda _: ask(served.address, "stop"), range(number))) == {504}
    health = httpx.get(f"{served.address}/health")
    assert health.status_code == 503
    assert "too long to tokenize" in health.json()["status"]
    assert ask(served.address, "go") == 504
    assert threading.active_count() - before <= texts.MOST_STUCK + 2  # and some of uvicorn's
    end()
    soon(lambda: httpx.get(f"{served.address}/health").status_code == 200)
    assert ask(served.address, "go") == 200


def test_a_thread_that_is_free_again_is_one_too_many_and_ends(monkeypatch):
    monkeypatch.setattr(texts, "STUCK_SECONDS", 0.05)
    threads, over = Threads(1), threading.Event()
    name = threads.submit(lambda: threading.current_thread()).result(10)
    late = threads.submit(over.wait)
    time.sleep(0.1)
    for _ in range(2):
        threads.replace_stuck()
    assert threads.num_stuck == 1
    assert threads.submit(lambda: threading.current_thread()).result(10) is not name
    over.set()
    assert late.result(10)
    name.join(10)
    assert not name.is_alive()
    assert threads.num_stuck == 0
