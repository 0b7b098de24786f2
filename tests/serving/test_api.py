"""The interface over a socket, with httpx and with OpenAI's client."""

import asyncio
import copy
import dataclasses
import json
import threading
import time

import httpx
import openai
import pytest

from switchlm.generation.answer import put_into_blanks
from switchlm.generation.route import route
from switchlm.serving.api import create_app
from switchlm.serving.server import EngineError

TEXT = "A <extra_id_0> text of <extra_id_1> things."


def text_alone(alone, tokenizer, prompt, limit):
    """Return the output for a prompt alone."""
    return tokenizer.decode(alone([*tokenizer.encode(prompt), tokenizer.end_id], limit))


def events(response):
    """Return the JSON of server-sent events, which end with [DONE]."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@pytest.fixture
def client(serve):
    served = serve(interface={"key": "a key of the test"})
    with openai.OpenAI(base_url=f"{served.address}/v1", api_key="a key of the test") as client:
        yield client


def test_openai_s_client_completes(client, alone, tokenizer):
    done = client.completions.create(model="nano", prompt="hello", max_tokens=20)
    assert done.choices[0].text == text_alone(alone, tokenizer, "hello", 20)
    assert done.choices[0].finish_reason == "length"
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (6, 20)


def test_openai_s_client_streams(client, alone, tokenizer):
    chunks = [
        *client.completions.create(
            model="nano",
            prompt="hello",
            max_tokens=20,
            stream=True,
            stream_options={"include_usage": True},
        )
    ]
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert text == text_alone(alone, tokenizer, "hello", 20)
    assert len(chunks) > 3
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 20


def test_openai_s_client_gets_several_seeded_outputs_of_several_prompts(client):
    def ask(**options):
        done = client.completions.create(
            model="nano", prompt=["a", "a"], n=2, temperature=1.0, max_tokens=8, **options
        )
        assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
        return [choice.text for choice in done.choices]

    assert ask(seed=1) == ask(seed=1)
    assert ask() != ask()
    assert len(set(ask(seed=1))) == len(ask(seed=1))


def test_openai_s_client_lists_models_and_reads_errors(client):
    (model,) = client.models.list().data
    assert (model.id, model.capacity) == ("nano", "dropless")
    assert client.models.retrieve("nano") == model
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.completions.create(model="other", prompt="hello")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="nano", prompt="hello", max_tokens=0)
    assert caught.value.param == "max_tokens"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="another").completions.create(model="nano", prompt="hello")


def test_fill_inserts_spans_into_blanks(serve):
    address = serve().address
    found = httpx.post(f"{address}/v1/fill", json={"text": TEXT, "max_tokens": 30}).json()
    assert found["text"] == TEXT
    spans = {int(number): span for number, span in found["spans"].items()}
    assert found["filled"] == put_into_blanks(TEXT, spans)
    assert found["finished"] is False
    assert found["usage"]["completion_tokens"] == 30
    streamed = httpx.post(
        f"{address}/v1/fill", json={"text": TEXT, "max_tokens": 30, "stream": True}
    )
    *growing, last = events(streamed)
    assert last == found
    outputs = [event["output"] for event in growing]
    assert outputs == sorted(outputs, key=len)
    assert found["output"].startswith(outputs[-1])


def test_route_returns_the_expert_of_each_token(serve, model):
    address = serve().address
    found = httpx.post(f"{address}/v1/route", json={"text": "ab", "output": "c"}).json()
    assert (found["model"], found["num_experts"]) == ("nano", model.config.num_experts)
    for part, length in (("encoder", 3), ("decoder", 2)):
        assert len(found[part]["tokens"]) == length
        for layer in found[part]["layers"]:
            assert len(layer["expert"]) == len(layer["gate"]) == length
            assert sum(layer["load"]) == length
            assert all(layer["kept"])
    own = httpx.post(f"{address}/v1/route", json={"text": "ab"})
    assert own.status_code == 200


def test_streams_go_on_while_routes_generate(serve):
    """A route's output is generated in a slot, beside those of others."""
    served = serve(max_target=64)
    with httpx.Client(base_url=served.address, timeout=60) as client:
        body = {"prompt": "hello", "max_tokens": 64, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            before = served.engine.statistics.value("switchlm_rows_total")
            routed = httpx.post(f"{served.address}/v1/route", json={"text": "ab"})
            after = served.engine.statistics.value("switchlm_rows_total")
            assert len(list(lines)) > 3
    assert len(routed.json()["decoder"]["tokens"]) == 65
    # All tokens of the route are rows of the engine's steps, and some are the stream's.
    assert after - before > 64
    assert served.engine.num_active == 0


@pytest.mark.parametrize("enforce_capacity", [False, True])
def test_routes_are_those_of_the_model_alone(serve, model, tokenizer, enforce_capacity):
    text = "a text of some length"
    body = {"text": text, "enforce_capacity": enforce_capacity}
    found = httpx.post(f"{serve().address}/v1/route", json=body).json()
    expected = route(copy.deepcopy(model), tokenizer, text, enforce_capacity=enforce_capacity)
    assert found == {"model": "nano", **dataclasses.asdict(expected)}


def test_routes_have_a_deadline(serve, soon):
    served = serve(seconds=0.3)
    busy = threading.Event()
    served.engine.call(lambda: busy.wait(20))
    try:
        for body in ({"text": "ab"}, {"text": "ab", "output": "c"}):
            begin = time.monotonic()
            answer = httpx.post(f"{served.address}/v1/route", json=body)
            assert answer.status_code == 504
            assert time.monotonic() - begin < 10
    finally:
        busy.set()
    soon(lambda: httpx.post(f"{served.address}/v1/route", json=body).status_code == 200, 60)


def test_the_page_needs_no_key_and_the_report_does(serve):
    address = serve(interface={"key": "a key of the test", "report": "<p>A report</p>"}).address
    page = httpx.get(address)
    assert page.status_code == 200
    assert "script-src" in page.headers["Content-Security-Policy"]
    assert httpx.get(f"{address}/page/page.css").headers["Content-Type"].startswith("text/css")
    assert httpx.get(f"{address}/page/../api.py").status_code == 401
    assert httpx.get(f"{address}/report").status_code == 401
    headers = {"Authorization": "Bearer a key of the test"}
    assert httpx.get(f"{address}/report", headers=headers).text == "<p>A report</p>"
    assert httpx.get(f"{address}/v1/models", headers=headers).json()["data"][0]["report"] is True


def test_what_is_served_is_said_where_nothing_is(client, serve):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="nano", messages=[{"role": "user", "content": "a"}])
    served = "POST /v1/completions, /v1/fill or /v1/route, or GET /v1/models"
    error = caught.value
    assert error.body == {
        "message": f"There is no /v1/chat/completions here, and no chat: use {served}.",
        "type": "invalid_request_error",
        "param": None,
        "code": 404,
    }
    address = serve().address
    for path in ("/v1/chat", "/v1/embeddings", "/v1", "/v1/completions/", "/chat/completions"):
        answer = httpx.post(f"{address}{path}", json={})
        assert answer.status_code == 404
        assert answer.json()["error"]["message"].startswith(f"There is no {path} here, and no chat")
    answer = httpx.post(f"{address}/v1/{'é' * 500}", json={})
    assert (answer.status_code, len(answer.text) < 1000) == (404, True)
    answer = httpx.get(f"{address}/a%3Fb%0A%00")
    assert r"There is no /a?b\n\x00 here" in answer.json()["error"]["message"]
    schema = httpx.get(f"{address}/openapi.json").json()
    assert all(one in schema["paths"] for one in served.replace(",", "").split() if "/" in one)


def test_ids_beyond_the_vocabulary_are_the_client_s(client, model):
    last = model.config.vocabulary_size - 1
    assert client.completions.create(model="nano", prompt=[last], max_tokens=1).choices
    for prompt in ([last + 1], [5, 10**9], [[5], [10**30]]):
        with pytest.raises(openai.BadRequestError, match=f"; ids of this model end at {last}") as e:
            client.completions.create(model="nano", prompt=prompt)
        assert "tokenizer" not in str(e.value)


def test_there_are_no_pages_that_load_from_other_origins(serve):
    address = serve().address
    assert httpx.get(f"{address}/docs").status_code == 404
    assert httpx.get(f"{address}/redoc").status_code == 404
    schema = httpx.get(f"{address}/openapi.json").json()
    assert set(schema["paths"]) == {
        "/health", "/metrics", "/v1/completions", "/v1/fill", "/v1/models",
        "/v1/models/{model}", "/v1/route"
    }  # fmt: skip


def test_a_failing_request_is_an_error_and_the_next_succeeds(serve, monkeypatch):
    served = serve()
    monkeypatch.setattr(served.engine.model, "encode", None)
    for stream in (False, True):
        body = {"prompt": "hello", "max_tokens": 4, "stream": stream}
        answer = httpx.post(f"{served.address}/v1/completions", json=body)
        assert answer.status_code == 500
        assert "This request failed" in answer.json()["error"]["message"]
    assert httpx.post(f"{served.address}/v1/route", json={"text": "a"}).status_code == 500
    monkeypatch.undo()
    body = {"prompt": "hello", "max_tokens": 4}
    assert httpx.post(f"{served.address}/v1/completions", json=body).status_code == 200


def test_the_server_ends_with_the_engine(serve, monkeypatch):
    served = serve()
    monkeypatch.setattr(served.engine, "_step", None)
    body = {"prompt": "hello", "max_tokens": 4}
    answer = httpx.post(f"{served.address}/v1/completions", json=body)
    assert answer.status_code == 500
    assert "the engine has ended" in answer.json()["error"]["message"]
    with pytest.raises(EngineError, match="TypeError: 'NoneType' object is not callable"):
        served.run.result(30)

    async def ask():
        transport = httpx.ASGITransport(create_app(served.engine, name="nano"))
        async with httpx.AsyncClient(transport=transport, base_url="http://a") as client:
            assert (await client.get("/health")).status_code == 503
            assert (await client.post("/v1/completions", json=body)).status_code == 503

    asyncio.run(ask())


def test_a_request_out_of_time_gets_504(serve):
    address = serve(seconds=0.05, max_target=512).address
    body = {"prompt": "hello", "max_tokens": 512}
    assert httpx.post(f"{address}/v1/completions", json=body).status_code == 504
