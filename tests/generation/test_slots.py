"""A request has the same tokens alone and in a batch, whatever is added and removed."""

import random

import pytest
import torch

from switchlm.generation.decode import evaluation_mode, generate, pad_prompts
from switchlm.generation.sampling import GREEDY, Sampling
from switchlm.generation.slots import Slots


@pytest.fixture
def model(build):
    return build()


SAMPLINGS = [GREEDY, Sampling(temperature=1.0), Sampling(temperature=0.7, top_k=5, top_p=0.9)]


def alone(model, ids, limit, sampling, seed):
    inputs_BS, _ = pad_prompts([ids], model.config.pad_id)
    done = generate(model, inputs_BS, max_new_tokens=limit, sampling=sampling, seeds=seed)
    return done.tokens_BT[0].tolist()


def requests(model, number):
    draw = random.Random(number)
    return [
        {
            "ids": [draw.randrange(3, 60) for _ in range(draw.randrange(1, 40))],
            "limit": draw.randrange(1, 20),
            "sampling": draw.choice(SAMPLINGS),
            "seed": draw.randrange(100),
        }
        for _ in range(number)
    ]


def run(slots, asked, num_added):
    """Serve all requests; `num_added`: how many may be added before each step."""
    found = {number: [] for number in range(len(asked))}
    waiting = list(range(len(asked)))
    while waiting or slots.requests:
        new = waiting[: min(next(num_added), slots.num_free)]
        waiting = waiting[len(new) :]
        if new:
            encoded = slots.encode([asked[number]["ids"] for number in new])
            for number, encoded_SD in zip(new, encoded, strict=True):
                one = asked[number]
                slots.add(
                    number,
                    encoded_SD,
                    sampling=one["sampling"],
                    seed=one["seed"],
                    limit=one["limit"],
                )
        if not slots.requests:
            continue
        running = slots.requests
        for number, token in zip(running, slots.step(), strict=True):
            found[number].append(token)
        for row in reversed(range(len(running))):
            tokens, one = found[running[row]], asked[running[row]]
            if tokens[-1] == slots.model.config.end_id or len(tokens) == one["limit"]:
                slots.remove(row)
    return found


@pytest.mark.parametrize("num_slots", [1, 3, 8])
def test_tokens_are_those_of_the_request_alone(model, num_slots) -> None:
    asked = requests(model, 12)
    draw = random.Random(num_slots)
    num_added = iter(lambda: draw.randrange(0, 4), None)
    with evaluation_mode(model, drop=False):
        slots = Slots(model, num_slots=num_slots, max_source=40, max_target=20)
        memory = slots.num_bytes
        found = run(slots, asked, num_added)
        assert slots.num_bytes == memory
        assert slots.num_free == num_slots
    for number, one in enumerate(asked):
        expected = alone(model, one["ids"], one["limit"], one["sampling"], one["seed"])
        assert found[number] == expected


def test_a_step_may_be_repeated_row_by_row(model) -> None:
    asked = [{**one, "limit": 10} for one in requests(model, 3)]
    with evaluation_mode(model, drop=False):
        whole, parts = (Slots(model, num_slots=3, max_source=40, max_target=10) for _ in range(2))
        for slots in (whole, parts):
            for number, encoded_SD in enumerate(slots.encode([one["ids"] for one in asked])):
                one = asked[number]
                slots.add(number, encoded_SD, sampling=one["sampling"], seed=one["seed"], limit=10)
        for _ in range(10):
            together = whole.step()
            assert together == [parts.step(row, row + 1)[0] for row in range(3)]


def test_nan_is_reported_for_its_row_only(model) -> None:
    with evaluation_mode(model, drop=False):
        slots = Slots(model, num_slots=2, max_source=8, max_target=4)
        good, bad = slots.encode([[5, 6, 1], [7, 8, 1]])
        slots.add("bad", bad * float("nan"), sampling=GREEDY, seed=0, limit=4)
        slots.add("good", good, sampling=GREEDY, seed=0, limit=4)
        first = slots.step()
        assert first[0] is None
        assert first[1] is not None
        slots.remove(0)
        assert all(t[0].isfinite().all() for pair in slots.own + slots.cross for t in pair)
        again = slots.encode([[7, 8, 1]])[0]
        slots.add("again", again, sampling=GREEDY, seed=0, limit=4)
        assert None not in slots.step()


def test_memory_is_allocated_before_the_first_request(model) -> None:
    config = model.config
    with evaluation_mode(model, drop=False):
        slots = Slots(model, num_slots=4, max_source=16, max_target=8)
    position_bytes = 2 * config.num_heads * config.d_kv * torch.float32.itemsize
    assert slots.num_bytes == 4 * (16 + 8) * config.num_decoder_layers * position_bytes


def test_more_slots_than_fit_are_refused_before_they_are_allocated(model) -> None:
    with pytest.raises(MemoryError, match=r"GB are free"), evaluation_mode(model, drop=False):
        Slots(model, num_slots=4096, max_source=2**20, max_target=2**20)
