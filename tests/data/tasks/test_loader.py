import numpy as np
import pytest
import torch

from switchlm.data.tasks.loader import PairLoader
from switchlm.data.tasks.task import Example
from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import DataError

BYTES = Tokenizer.bytes()


def example(text, target):
    return Example(input=text, target=target, references=(target,), identity=text)


def numbered(name, count, width=4):
    return [example(f"{name}{n:0{width}}", f"{n}") for n in range(count)]


def loader(tasks=None, **settings):
    defaults = {"input_length": 16, "target_length": 8, "batch_size": 4, "seed": 0}
    return PairLoader(tasks or {"a": numbered("a", 10)}, BYTES, **(defaults | settings))


def texts(batch):
    """Return (input, target) of every example in a batch, row by row."""
    found = []
    for row in range(len(batch.inputs_BS)):
        for segment in range(1, int(batch.target_segments_BT[row].max()) + 1):
            ids = batch.inputs_BS[row][batch.input_segments_BS[row] == segment].tolist()
            answer = batch.targets_BT[row][batch.target_segments_BT[row] == segment].tolist()
            assert ids[-1] == answer[-1] == BYTES.end_id
            found.append((BYTES.decode(ids), BYTES.decode(answer)))
    return found


@pytest.mark.parametrize("pack", [False, True])
def test_a_pass_gives_every_example_once(pack):
    examples = numbered("a", 24)
    data = loader({"a": examples}, pack=pack, input_length=13, batch_size=1)
    steps = 12 if pack else 24
    met = [pair for step in range(steps) for pair in texts(data.batch(step))]
    assert sorted(met) == [(one.input, one.target) for one in examples]
    second = [pair for step in range(steps, 2 * steps) for pair in texts(data.batch(step))]
    assert sorted(second) == sorted(met)
    assert second != met, "every pass has an order of its own"


def test_a_batch_depends_on_seed_and_step_alone():
    one, same, other = loader(), loader(), loader(seed=1)
    assert torch.equal(one.batch(7).inputs_BS, same.batch(7).inputs_BS)
    assert texts(one.batch(7)) != texts(other.batch(7))
    batches = one.iterate(5)
    for step in (5, 6, 7):
        number, batch = next(batches)
        assert number == step
        assert torch.equal(batch.targets_BT, same.batch(step).targets_BT)
    batches.close()


def test_rows_are_as_long_as_the_longest_needs_in_eights_and_padding_is_segment_0():
    batch = loader(input_length=512, target_length=128).batch(0)
    assert batch.inputs_BS.shape == batch.input_segments_BS.shape == (4, 8)
    assert batch.targets_BT.shape == (4, 8)
    assert loader(input_length=7).batch(0).inputs_BS.shape == (4, 7), "no longer than configured"
    long = {"a": [example("x" * 20, "y" * 9)]}
    batch = loader(long, input_length=512, target_length=128).batch(0)
    assert (batch.inputs_BS.shape, batch.targets_BT.shape) == ((4, 24), (4, 16))


@pytest.mark.parametrize("pack", [False, True])
def test_rows_of_all_workers_are_equally_long(pack):
    tasks = {"a": [example("x" * (1 + n), "y" * (1 + n % 11)) for n in range(60)]}
    whole = loader(tasks, input_length=70, target_length=99, batch_size=4, pack=pack)
    shapes = {whole.batch(step).targets_BT.shape for step in range(9)}
    assert len(shapes) > 1
    for step in range(9):
        batch = whole.batch(step)
        parts = [whole.share(rank, 4).batch(step) for rank in range(4)]
        for name in ("inputs_BS", "targets_BT", "input_segments_BS", "source_B"):
            joined = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(joined, getattr(batch, name))


def test_padding_is_segment_0():
    batch = loader().batch(0)
    assert (batch.inputs_BS[batch.input_segments_BS == 0] == BYTES.pad_id).all()
    assert batch.num_tokens == 4 * (6 + 2), "five bytes and a digit, each with an end token"


def test_workers_share_the_rows_of_a_batch():
    whole = loader(batch_size=6)
    shares = [whole.share(rank, 3) for rank in range(3)]
    rows = torch.cat([next(share.iterate(4))[1].inputs_BS for share in shares])
    assert torch.equal(rows, whole.batch(4).inputs_BS)
    assert shares[1].sources == ("a",)
    with pytest.raises(DataError, match="cannot be divided evenly"):
        whole.share(0, 4)


def test_tasks_are_drawn_by_their_tokens():
    tasks = {"long": numbered("x", 30, width=12), "short": numbered("y", 30, width=4)}
    data = loader(tasks, input_length=20)
    sources = np.concatenate([data.batch(step).source_B for step in range(500)])
    tokens = [30 * (13 + 1) + 80, 30 * (5 + 1) + 80]  # targets: 50 digits and 30 ends
    assert data.sources == ("long", "short")
    assert (sources == 0).mean() == pytest.approx(tokens[0] / sum(tokens), abs=0.01)


def test_long_inputs_are_cut_counted_and_reported():
    lines = []
    tasks = {"a": [example("x" * 15, "y"), example("x" * 16, "y"), example("x" * 99, "y")]}
    data = loader(tasks, report=lines.append)
    assert "2 inputs truncated to 16 tokens" in lines[0]
    assert {len(text) for text, _ in texts(data.batch(0))} == {15}


def test_long_targets_are_refused_or_cut_and_counted():
    tasks = {"a": [example("x", "y" * 7), example("x", "z" * 12), example("x", "y" * 8)]}
    with pytest.raises(DataError, match=r"2 of 3 targets.*'a'.*8 tokens, the longest 13: 'zzz"):
        loader(tasks)
    lines = []
    data = loader(tasks, long_targets="truncate", report=lines.append)
    assert "2 targets truncated to 8 tokens" in lines[0]
    assert {target for _, target in texts(data.batch(0))} == {"y" * 7, "z" * 7}


def test_added_tokens_in_a_text_are_their_ids_and_an_end_token_is_reported():
    tasks = {"a": [example("a<extra_id_0>b", "<extra_id_0>c</s>d")]}
    lines = []
    batch = loader(tasks, batch_size=1, report=lines.append).batch(0)
    first, end = BYTES.sentinel_ids[0], BYTES.end_id
    inputs, targets = batch.inputs_BS[0].tolist(), batch.targets_BT[0].tolist()
    assert inputs[:4] == [3 + ord("a"), first, 3 + ord("b"), end]
    assert targets[:5] == [first, 3 + ord("c"), end, 3 + ord("d"), end]
    assert "1 of 1 targets cannot be written" in lines[1]
    assert "1 targets hold the end token" in lines[1]


def test_held_out_batches_take_turns_and_are_the_same_for_every_seed():
    tasks = {"a": numbered("a", 9), "b": numbered("b", 9)}
    held_out = {"a": numbered("A", 5), "b": numbered("B", 5)}
    batches = loader(tasks, held_out=held_out).held_out(5)
    assert [batch.source_B.tolist() for batch in batches] == [[0, 1, 0, 1]] * 2
    met = [text for batch in batches for text, _ in texts(batch)]
    assert len(set(met)) == 8
    again = loader(tasks, held_out=held_out, seed=3).held_out(1)
    assert texts(again[0]) == texts(batches[0])
    only = loader(tasks, held_out=held_out).held_out(5, source="b")
    assert {text[0] for text, _ in texts(only[0])} == {"B"}
    assert loader(tasks).held_out(5) == []


def test_few_held_out_examples_repeat_to_fill_a_batch():
    (batch,) = loader(held_out={"a": numbered("A", 3)}).held_out(9)
    assert [text for text, _ in texts(batch)] == ["A0000", "A0001", "A0002", "A0000"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": {"a": []}}, "'a' has no examples"),
        ({"held_out": {"b": numbered("b", 2)}}, "no task 'b'"),
    ],
)
def test_mistakes_are_errors(arguments, message):
    with pytest.raises(DataError, match=message):
        loader(**arguments)


def test_no_task_is_an_error():
    with pytest.raises(DataError, match="no task to train on"):
        PairLoader({}, BYTES, input_length=8, target_length=8, batch_size=1, seed=0)
