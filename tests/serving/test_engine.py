"""The engine without HTTP: tokens, order, failures, ends."""

import dataclasses
import queue
import random
import threading

import pytest

from switchlm.generation.sampling import GREEDY, Sampling
from switchlm.generation.slots import Slots
from switchlm.generation.text_stream import TextStream
from switchlm.serving.requests import (
    BusyError,
    ClosingError,
    Event,
    Output,
    Request,
    RequestError,
)

IDS = (5, 6, 7, 1)


def test_tokens_are_those_of_the_request_alone(engine, collector, alone):
    draw, running = random.Random(0), engine(num_slots=3, queue=64)
    samplings = [GREEDY, Sampling(temperature=0.8, top_k=9, top_p=0.9)]
    asked = [
        Request(
            ids=tuple(draw.randrange(3, 60) for _ in range(draw.randrange(1, 50))),
            limit=draw.randrange(1, 30),
            sampling=draw.choice(samplings),
            seed=number,
        )
        for number in range(16)
    ]
    heard = [collector() for _ in asked]
    for request, listener in zip(asked, heard, strict=True):
        running.submit(request, listener)
    for request, listener in zip(asked, heard, strict=True):
        expected = alone(request.ids, request.limit, request.sampling, request.seed)
        assert listener.end() == (expected, "length")
    assert running.statistics.value("switchlm_requests_total", outcome="length") == 16
    limits = sum(request.limit for request in asked)
    assert running.statistics.value("switchlm_new_tokens_total") == limits


def test_every_end_token_of_the_model_ends_an_output(engine, collector, monkeypatch):
    running, listener = engine(), collector()
    config = dataclasses.replace(running.model.config, generation_end_ids=(7, 9))
    monkeypatch.setattr(running.model, "config", config)
    monkeypatch.setattr(Slots, "step", lambda slots, first, last: [9])
    running.submit(Request(ids=IDS, limit=5), listener)
    assert listener.end() == ([9], "stop")
    assert "".join(event.piece for event in listener.events) == ""


@pytest.mark.parametrize(("skip", "text"), [(False, "<extra_id_0>"), (True, "")])
def test_special_tokens_are_left_out_if_asked(engine, collector, monkeypatch, skip, text):
    running, listener = engine(skip_special=skip), collector()
    first = running.tokenizer.sentinel_ids[0]
    monkeypatch.setattr(Slots, "step", lambda slots, *about: [first])
    running.submit(Request(ids=IDS, limit=3), listener)
    assert listener.end() == ([first] * 3, "length")
    assert "".join(event.piece for event in listener.events) == 3 * text


def test_a_failure_is_one_sentence():
    with pytest.raises(RequestError, match=r"^This request failed: Take bfloat16\.$"):
        Output().add(Event(reason="error", message="Take bfloat16."))


def test_first_come_first_served(engine, collector):
    running, ends = engine(num_slots=1), []
    heard = []
    for number in range(6):
        listener = collector()

        def on_event(event, number=number, listener=listener):
            if event.reason:
                ends.append(number)
            listener(event)

        running.submit(Request(ids=IDS, limit=3), on_event)
        heard.append(listener)
    for listener in heard:
        listener.end()
    assert ends == list(range(6))


def test_a_full_queue_refuses_at_once_with_a_time_to_retry(engine, collector):
    running = engine(num_slots=1, queue=2, max_target=512)
    first = collector()
    running.submit(Request(ids=IDS, limit=512), first)
    assert first.began.wait(10)
    waiting = [collector(), collector()]
    for listener in waiting:
        running.submit(Request(ids=IDS, limit=1), listener)
    with pytest.raises(BusyError, match="2 requests are waiting") as caught:
        running.submit(Request(ids=IDS, limit=1), collector())
    assert int(caught.value.headers["Retry-After"]) >= 1
    assert [listener.end()[1] for listener in (first, *waiting)] == ["length"] * 3
    assert running.statistics.value("switchlm_requests_total", outcome="refused") == 1


def test_a_cancelled_request_frees_its_slot_within_one_step(engine, collector, soon):
    running = engine(num_slots=1, max_target=512)
    running.submit(Request(ids=IDS, limit=512), listener := collector()).cancel()
    assert listener.end()[1] == "cancelled"
    for _ in range(5):
        listener, submitted, cancelled_at = collector(), queue.Queue(), []

        def on_event(event, listener=listener, submitted=submitted, cancelled_at=cancelled_at):
            listener(event)
            if len(listener.events) == 3:
                submitted.get().cancel()
                cancelled_at.append(running.statistics.value("switchlm_steps_total"))

        submitted.put(running.submit(Request(ids=IDS, limit=512), on_event))
        assert listener.end()[1] == "cancelled"
        assert running.statistics.value("switchlm_steps_total") - cancelled_at[0] <= 1
        soon(lambda: running.num_active == 0)


def test_requests_cancelled_or_overdue_in_the_queue_never_have_a_slot(engine, collector):
    running = engine(num_slots=1, max_target=512)
    running.submit(Request(ids=IDS, limit=512), first := collector())
    assert first.began.wait(10)
    gone, late = collector(), collector()
    running.submit(Request(ids=IDS, limit=5), gone).cancel()
    running.submit(Request(ids=IDS, limit=5, seconds=0.01), late)
    assert gone.end() == ([], "cancelled")
    assert late.end() == ([], "deadline")
    assert not first.done.is_set()
    assert first.end()[1] == "length"


def test_a_request_out_of_time_ends(engine, collector):
    running = engine(max_target=512)
    running.submit(Request(ids=IDS, limit=512, seconds=0.05), listener := collector())
    tokens, reason = listener.end()
    assert reason == "deadline"
    assert len(tokens) < 512


class Panic(BaseException):
    """Like the panics of libraries in Rust, no Exception."""


def failing(original, bad, error=RuntimeError):
    """Raise if `bad` finds the failing request in the arguments."""

    def call(*arguments, **options):
        if bad(*arguments, **options):
            raise error("deliberate")
        return original(*arguments, **options)

    return call


ODD = 57
STAGES = {
    "encode": (Slots, "encode", lambda _, prompts: any(ODD in ids for ids in prompts)),
    "add": (Slots, "add", lambda _, pending, *__, **___: ODD in pending.request.ids),
    "step": (
        Slots,
        "step",
        lambda slots, first=0, last=None: any(
            ODD in pending.request.ids and pending.num_tokens == 3
            for pending in slots.requests[first:last]
        ),
    ),
}


@pytest.mark.parametrize("stage", [*STAGES, "text", "end", "listener"])
def test_an_exception_fails_its_request_only(stage, engine, collector, alone, monkeypatch):
    running = engine(num_slots=4)
    odd = collector()
    on_event = odd
    if stage in STAGES:
        owner, name, bad = STAGES[stage]
        monkeypatch.setattr(owner, name, failing(getattr(owner, name), bad))
    elif stage == "text":
        push = failing(TextStream.push, lambda stream, _: "odd stop" in stream._stops, Panic)
        monkeypatch.setattr(TextStream, "push", push)
    elif stage == "end":
        finish = failing(TextStream.finish, lambda stream: "odd stop" in stream._stops, Panic)
        monkeypatch.setattr(TextStream, "finish", finish)
    else:

        def on_event(event):
            odd(event)
            if event.reason is None:
                raise RuntimeError("deliberate")

    good = [(8, 9, 1), (10, 11, 12, 1), (13, 1)]
    heard = [collector() for _ in good]
    for ids, listener in zip(good, heard, strict=True):
        running.submit(Request(ids=ids, limit=12), listener)
    running.submit(Request(ids=(9, ODD, 1), limit=12, stops=("odd stop",)), on_event)
    tokens, reason = odd.end()
    assert reason == "error"
    assert "deliberate" in odd.events[-1].message
    assert len(tokens) == {"step": 3, "listener": 1, "end": 11}.get(stage, 0)
    for ids, listener in zip(good, heard, strict=True):
        assert listener.end() == (alone(ids, 12), "length")
    running.submit(Request(ids=IDS, limit=5), after := collector())
    assert after.end() == (alone(IDS, 5), "length")


def test_stop_strings_end_the_output_and_are_not_part_of_it(engine, collector, alone, tokenizer):
    ids = alone(IDS, 40)
    text = tokenizer.decode(ids)
    stop = text[6:8]
    running = engine()
    running.submit(Request(ids=IDS, limit=40, stops=(stop,)), listener := collector())
    _, reason = listener.end()
    assert reason == "stop"
    assert "".join(event.piece for event in listener.events) == text[: text.index(stop)]


def test_closing_finishes_accepted_requests_and_refuses_new_ones(engine, collector, alone):
    running = engine(num_slots=2)
    heard = [collector() for _ in range(6)]
    for listener in heard:
        running.submit(Request(ids=IDS, limit=20), listener)
    running.close(30)
    expected = alone(IDS, 20)
    assert all(listener.done.is_set() for listener in heard)
    assert [listener.end() for listener in heard] == [(expected, "length")] * 6
    with pytest.raises(ClosingError):
        running.submit(Request(ids=IDS, limit=20), collector())


def test_calls_run_between_steps_and_their_errors_are_returned(engine, collector):
    running = engine(max_target=512)
    running.submit(Request(ids=IDS, limit=512), listener := collector())
    assert running.call(lambda: threading.current_thread().name).result(10) == "switchlm-engine"
    with pytest.raises(KeyError):
        running.call(lambda: {}["nothing"]).result(10)
    with pytest.raises(RuntimeError, match="Panic: deliberate"):
        running.call(failing(None, lambda: True, Panic)).result(10)
    assert listener.end()[1] == "length"


@pytest.mark.parametrize("stage", ["_admit", "_step", "_add"])
def test_an_engine_that_dies_fails_all_requests_and_calls(stage, engine, collector, monkeypatch):
    running = engine(num_slots=2)
    ready = threading.Event()
    running.call(ready.wait)

    def die(slots, *rest):
        raise Panic("deliberate")

    monkeypatch.setattr(running, stage, die)
    heard = [collector() for _ in range(6)]
    for listener in heard:
        running.submit(Request(ids=IDS, limit=20), listener)
    late = running.call(lambda: None)
    ready.set()
    for listener in heard:
        assert listener.end() == ([], "error")
        assert "the engine has ended" in listener.events[-1].message
    with pytest.raises(RuntimeError, match="the engine has ended"):
        late.result(10)
    with pytest.raises(Panic):
        running.ended.result(10)
    with pytest.raises(ClosingError):
        running.submit(Request(ids=IDS, limit=20), collector())
    assert running.num_active == running.num_waiting == 0
