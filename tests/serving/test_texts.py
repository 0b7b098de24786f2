"""Threads that tokenize texts: a text that takes for ever costs one of them, not the server."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from switchlm.serving import texts
from switchlm.serving.server import EngineError
from switchlm.serving.texts import Threads


@pytest.fixture
def stuck(monkeypatch):
    """Let texts that begin with `stop` be tokenized until the end of the test."""
    monkeypatch.setattr(texts, "STUCK_SECONDS", 0.2)
    over = threading.Event()

    def slow(tokenizer):
        encode = tokenizer.encode

        def wait(text):
            if text.startswith("stop"):
                over.wait()
            return encode(text)

        monkeypatch.setattr(tokenizer, "encode", wait)

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


def test_too_many_of_them_end_the_server_with_a_message(serve, stuck):
    served = serve(seconds=20.0)
    stuck(served.engine.tokenizer)
    number = texts.MOST_STUCK + 1
    with ThreadPoolExecutor(number) as clients:
        for _ in range(number):
            clients.submit(ask, served.address, "stop")
        with pytest.raises(EngineError, match="9 texts have been tokenized for more than"):
            served.run.result(30)


def test_a_thread_that_is_free_again_is_one_too_many_and_ends(monkeypatch):
    monkeypatch.setattr(texts, "STUCK_SECONDS", 0.05)
    threads, over = Threads(1), threading.Event()
    name = threads.submit(lambda: threading.current_thread()).result(10)
    late = threads.submit(over.wait)
    time.sleep(0.1)
    assert threads.replace_stuck() == 1
    assert threads.replace_stuck() == 1
    assert threads.submit(lambda: threading.current_thread()).result(10) is not name
    over.set()
    assert late.result(10)
    name.join(10)
    assert not name.is_alive()
    assert threads.replace_stuck() == 0
