"""Bodies as clients send them: OpenAI's, LangChain's, and lm-eval's."""

import json
import typing

import httpx
import openai
import pytest
from openai.types.chat.chat_completion_stream_options_param import ChatCompletionStreamOptionsParam
from openai.types.completion_create_params import CompletionCreateParamsBase

from switchlm.serving.bodies import Completion, Fill, StreamOptions, parse
from switchlm.serving.requests import RequestError

NEUTRAL = {
    "best_of": 1, "echo": False, "frequency_penalty": 0, "logit_bias": {}, "logprobs": None,
    "n": 1, "presence_penalty": 0.0, "seed": None, "stop": None, "suffix": None, "top_p": 1,
    "temperature": 0, "user": "someone", "stream_options": None,
}  # fmt: skip


@pytest.fixture
def client(serve):
    with openai.OpenAI(base_url=f"{serve().address}/v1", api_key="-", max_retries=0) as client:
        yield client


def complete(client, **options):
    done = client.completions.create(model="nano", **options)
    return [choice.text for choice in done.choices]


def test_every_field_of_openai_s_client_is_known():
    fields = typing.get_type_hints(CompletionCreateParamsBase)
    assert set(fields) <= set(Completion.model_fields)
    options = typing.get_type_hints(ChatCompletionStreamOptionsParam)
    assert set(options) == set(StreamOptions.model_fields)


def test_values_that_change_nothing_are_accepted(client):
    plain = complete(client, prompt="hello", max_tokens=4)
    assert complete(client, prompt="hello", max_tokens=4, **NEUTRAL) == plain
    extra = {"max_completion_tokens": 4, "logit_bias": {"5": 0}, "suffix": "", "stream": None}
    assert complete(client, prompt="hello", extra_body=extra) == plain
    nothing = dict.fromkeys(NEUTRAL)
    assert complete(client, prompt="hello", max_tokens=4, extra_body=nothing) == plain


REFUSED = {
    "best_of": 2, "echo": True, "frequency_penalty": 0.5, "logit_bias": {"5": 100}, "logprobs": 0,
    "n": 9, "presence_penalty": -1, "suffix": "end", "max_tokens": 0, "temperature": 1e-46,
    "max_completion_tokens": 5, "stream_options.include_obfuscation": True, "min_p": None,
    "seed": 2**63,
}  # fmt: skip


def test_other_values_are_refused_by_name_in_one_sentence(client):
    for name, value in REFUSED.items():
        outer, _, inner = name.partition(".")
        body = {"max_tokens": 4, "temperature": 1, "stream": True}
        body[outer] = {inner: value} if inner else value
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="nano", prompt="hello", extra_body=body)
        assert outer in caught.value.message
        assert "\n" not in caught.value.message
        assert caught.value.param == (None if name == "temperature" else name)


def test_prompts_in_all_four_forms(client, tokenizer):
    texts = ["hello", "abc"]
    ids = [tokenizer.encode(text) for text in texts]
    expected = complete(client, prompt=texts, max_tokens=6)
    assert complete(client, prompt=ids, max_tokens=6) == expected
    ended = [[*ids[0], tokenizer.end_id], ids[1]]
    assert complete(client, prompt=ended, max_tokens=6) == expected
    assert complete(client, prompt=ids[0], max_tokens=6) == expected[:1]
    assert complete(client, prompt=texts[0], max_tokens=6) == expected[:1]


BAD_PROMPTS = [
    [], [[]], [[5], "a"], ["a", [5]], [5, "a"], [True], [1.5], [None], None, {}, [[[5]]], [5, [5]],
    [-1], [[2**70]], [383, 384], [1], [[5]] * 33, [5] * 64, [5] * 300_000,
]  # fmt: skip


def test_other_prompts_are_refused(serve):
    with httpx.Client(base_url=serve().address) as client:
        for prompt in BAD_PROMPTS:
            answer = client.post("/v1/completions", json={"prompt": prompt})
            assert answer.status_code == 400, str(prompt)[:50]
            assert len(answer.text) < 500


# What the clients sent to a server that recorded it.
LANGCHAIN = [
    {"model": "nano", "prompt": ["a", "b"], "frequency_penalty": 0, "logprobs": None,
     "max_tokens": 56, "n": 1, "presence_penalty": 0, "seed": None, "temperature": 0.7, "top_p": 1},
    {"model": "nano", "stream": True, "prompt": "hello", "frequency_penalty": 0, "logprobs": None,
     "max_tokens": 56, "n": 1, "presence_penalty": 0, "seed": None, "stop": ["\n"],
     "temperature": 0.7, "top_p": 1},
]  # fmt: skip
LM_EVAL = [
    {"prompt": ["hello", "abc"], "model": "nano", "max_tokens": 8, "temperature": 0,
     "stop": ["\n\n", "</s>"], "seed": 1234},
    {"prompt": [[107, 104], [100]], "model": "nano", "max_tokens": 8, "temperature": 0,
     "stop": ["\n\n", "<|endoftext|>"], "seed": 1234},
]  # fmt: skip


def test_langchain_and_lm_eval_are_understood(serve):
    address = serve().address
    for body in LANGCHAIN + LM_EVAL:
        answer = httpx.post(f"{address}/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        if not body.get("stream"):
            assert len(answer.json()["choices"]) == 2


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        (["a"] * 9, "at most 8 stop texts, not 9"),
        (3, "must be a text or a list of texts"),
        (["a", None], "must be a text or a list of texts"),
        ({}, "must be a text or a list of texts"),
        ("", "a stop text has 1 to 256 characters, not 0"),
        (["a", "b" * 257], "a stop text has 1 to 256 characters, not 257"),
        (["\ud800"], "the text holds half a surrogate pair, which is no character"),
    ],
)
def test_a_mistake_in_stop_is_one_sentence(stop, message):
    for kind, body in ((Completion, {"prompt": "a"}), (Fill, {"text": "a"})):
        with pytest.raises(RequestError, match=f"^stop: {message}\\.$") as caught:
            parse(kind, json.dumps({**body, "stop": stop}).encode())
        assert caught.value.param == "stop"


def test_stop_texts_are_one_or_several():
    for stop, expected in ((None, ()), ("a", ("a",)), ([], ()), (["b"] * 8, ("b",) * 8)):
        body = json.dumps({"prompt": "a", "stop": stop}).encode()
        assert parse(Completion, body).stops == expected
    options = b'{"prompt": "a", "stream_options": 3}'
    with pytest.raises(RequestError, match=r"^stream_options: must be an object\.$"):
        parse(Completion, options)


def test_the_work_does_not_grow_with_the_mistakes():
    """One error of 200,000 is found; a list of all would take a second."""
    for body in (
        {f"field{number}": 0 for number in range(40_000)},
        {"prompt": "a", "stream_options": {str(number): 0 for number in range(40_000)}},
        {"prompt": "a", "stop": [0] * 100_000},
        {"prompt": [0.5] * 100_000},
    ):
        content = json.dumps(body).encode()
        with pytest.raises(RequestError) as caught:
            parse(Completion, content)
        assert len(str(caught.value)) < 500
    for many in (b"[]," * 100_001, b'"a":0,' * 50_001):
        with pytest.raises(RequestError, match="brackets and quotes"):
            parse(Completion, b'{"prompt": [' + many + b"[]]}")
