"""Limits on requests: bodies, fields, keys, time."""

import json
import socket
import time
import urllib.parse

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from switchlm.serving.receive import Bodies

KEY = "a key of the test"
ROUTES = [
    ("GET", "/metrics"), ("GET", "/v1/models"), ("GET", "/openapi.json"), ("GET", "/nothing"),
    ("GET", "/report"), ("GET", "/page"), ("GET", "//health"), ("POST", "/v1/completions"),
    ("POST", "/v1/fill"), ("POST", "/v1/route"),
]  # fmt: skip


@pytest.mark.parametrize(
    "given_key", [None, "Basic", f"Bearer {KEY[:-1]}", f"bearer {KEY}x", "Bearer größe"]
)
def test_every_route_but_health_and_the_page_needs_the_key(serve, given_key):
    address = serve(interface={"key": KEY, "report": "<p>A report</p>"}).address
    headers = {}
    if given_key is not None:
        headers["Authorization"] = given_key.encode()
    with httpx.Client(headers=headers) as client:
        for method, path in ROUTES:
            answer = client.request(method, address + path)
            assert answer.status_code == 401, path
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert client.get(f"{address}/health").json() == {"status": "ok"}


def test_the_key_is_compared_in_constant_time_and_written_nowhere(serve, monkeypatch, capfd):
    from switchlm.serving import middleware

    compared = []
    original = middleware.hmac.compare_digest
    monkeypatch.setattr(
        middleware.hmac, "compare_digest", lambda *pair: compared.append(pair) or original(*pair)
    )
    address = serve(interface={"key": KEY}).address
    for key in (KEY, "wrong"):
        headers = {"Authorization": f"Bearer {key}"}
        answer = httpx.post(f"{address}/v1/completions", headers=headers, content="{")
        assert KEY not in answer.text
    assert compared == [(KEY.encode(), KEY.encode()), (b"wrong", KEY.encode())]
    assert KEY not in "".join(capfd.readouterr())


def test_the_error_of_a_field_of_two_types_names_both(serve):
    body = {"prompt": "a", "logprobs": "many"}
    answer = httpx.post(f"{serve().address}/v1/completions", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "logprobs"
    message = "logprobs: Input should be a valid integer, or: Input should be a valid boolean."
    assert error["message"] == message


BAD = {
    "bad UTF-8": b'{"prompt": "\xff\xfe"}',
    "deep JSON": b"[" * 200_000,
    "deep objects": b'{"prompt":' * 100_000,
    "half a surrogate pair": b'{"prompt": "\\ud800"}',
    "half a pair in a stop string": b'{"prompt": "a", "stop": "\\udfff"}',
    "not JSON": b"prompt=hello",
    "nothing": b"",
    "a number of a million digits": b'{"prompt": "a", "seed": ' + b"9" * 1_000_000 + b"}",
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "infinity": b'{"prompt": "a", "temperature": 1e999}',
    "a field too many": b'{"prompt": "a", "best_of": 2}',
    "a long prompt": json.dumps({"prompt": "a" * 300_000}).encode(),
    "a prompt of too many tokens": json.dumps({"prompt": "a" * 100}).encode(),
    "no prompt": b'{"prompt": ""}',
    "no prompts": b'{"prompt": []}',
    "many prompts": json.dumps({"prompt": ["a"] * 33}).encode(),
    "too many tokens": b'{"prompt": "a", "max_tokens": 65}',
    "far too many tokens": b'{"prompt": "a", "max_tokens": 1e30}',
    "many outputs": b'{"prompt": "a", "n": 1000}',
    "an empty stop string": b'{"prompt": "a", "stop": ""}',
}


HEAD = (
    b"POST /v1/fill HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: LENGTH\r\n\r\n"
)


def test_invalid_bodies_have_fixed_responses(serve):
    address = serve().address
    headers = {"Content-Type": "application/json"}
    with httpx.Client() as client:
        for what, body in BAD.items():
            answer = client.post(f"{address}/v1/completions", content=body, headers=headers)
            assert answer.status_code == 400, (what, answer.text)
            assert len(answer.text) < 1000, what
            assert answer.json()["error"]["message"], what
        good = client.post(f"{address}/v1/completions", json={"prompt": "a", "max_tokens": 2})
        assert good.status_code == 200
        wrong = client.get(f"{address}/v1/completions")
        assert wrong.status_code == 405
        message = "/v1/completions does not take GET: use POST."
        assert wrong.json()["error"]["message"] == message


def test_10_megabytes_are_refused_before_they_are_read(serve):
    address = serve().address
    body = json.dumps({"prompt": "a" * 10_000_000})
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{address}/v1/completions", content=body, headers=headers)
    assert answer.status_code == 413
    endless = (b" " * 65536 for _ in range(160))  # no Content-Length
    try:
        answer = httpx.post(f"{address}/v1/completions", content=endless, headers=headers)
    except httpx.TransportError:
        pass  # closed while we were still sending
    else:
        assert answer.status_code == 413


def test_a_slow_body_is_refused(serve):
    address = urllib.parse.urlsplit(serve(interface={"bodies": Bodies(seconds=0.3)}).address)
    with socket.create_connection((address.hostname, address.port)) as slow:
        slow.sendall(HEAD.replace(b"LENGTH", b"100") + b"{")
        begin = time.monotonic()
        answer = slow.recv(4096)
        assert answer.startswith(b"HTTP/1.1 408")
        assert time.monotonic() - begin < 5
        while slow.recv(4096):  # and the connection is closed
            pass


names = st.sampled_from([
    "prompt", "text", "output", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop",
    "stream", "n", "model", "user", "stream_options", "enforce_capacity", "x", "best_of", "echo",
    "logprobs", "logit_bias", "suffix", "max_completion_tokens", "frequency_penalty",
])  # fmt: skip
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["nano", "<extra_id_0>", "\ud800", "\x00", "a" * 99, "<extra_id_99>"]),
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=3)
)
bodies = st.dictionaries(names, values, max_size=8) | values
shaped = st.fixed_dictionaries(
    {"prompt": st.text(max_size=9)}, optional={"n": values, "stop": values, "seed": values}
)
filled = st.fixed_dictionaries(
    {"text": st.text(max_size=9).map(lambda text: text + "<extra_id_0>")},
    optional={"top_k": values, "top_p": values, "temperature": values, "output": values},
)


def test_no_body_breaks_the_server(serve):
    served = serve(max_target=4)
    headers = {"Content-Type": "application/json"}
    with httpx.Client(base_url=served.address, headers=headers) as client:

        @settings(suppress_health_check=list(HealthCheck), database=None)
        @given(st.sampled_from(["completions", "fill", "route"]), bodies | shaped | filled)
        def fuzz(route, body):
            answer = client.post(f"/v1/{route}", content=json.dumps(body))
            assert answer.status_code < 500, (route, body, answer.text)
            if answer.status_code != 200:
                assert answer.json()["error"]["message"]

        fuzz()
        assert client.get("/health").status_code == 200
    assert served.engine.statistics.value("switchlm_requests_total", outcome="error") == 0
