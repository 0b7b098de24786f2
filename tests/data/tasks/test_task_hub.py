"""Calls of `datasets`, which a fake replaces here."""

import sys
import types

import pytest

from switchlm.data.tasks.mixture import find_task, read_examples
from switchlm.data.tasks.task import Task
from switchlm.errors import DataError, MissingExtraError


@pytest.fixture
def stand_in(monkeypatch):
    """Replace `datasets` by a fake; returns its calls, and the records that it returns."""
    calls, answers = [], []

    def load_dataset(path, name=None, data_dir=None, split=None, revision=None):
        calls.append((path, name or data_dir, split, revision))
        if isinstance(answers[0], Exception):
            raise answers[0]
        return answers

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return calls, answers


@pytest.mark.parametrize(
    ("task", "split", "record", "expected_call"),
    [
        (
            "sst2",
            "train",
            {"sentence": "s", "label": 1, "idx": 0},
            ("nyu-mll/glue", "sst2", "train", None),
        ),
        (
            "mnli",
            "validation",
            {"premise": "p", "hypothesis": "h", "label": 2},
            ("nyu-mll/glue", "mnli", "validation_matched", None),
        ),
        (
            "boolq",
            "validation",
            {"question": "q", "passage": "p", "label": 0},
            ("aps/super_glue", "boolq", "validation", None),
        ),
        (
            "anli_r3",
            "test",
            {"premise": "p", "hypothesis": "h", "label": 0},
            ("facebook/anli", None, "test_r3", None),
        ),
        (
            "web_questions",
            "validation",
            {"question": "q", "answers": ["a"]},
            ("stanfordnlp/web_questions", None, "train[90%:]", None),
        ),
        (
            "arc_challenge",
            "train",
            {
                "question": "q",
                "choices": {"text": ["x", "y"], "label": ["A", "B"]},
                "answerKey": "A",
            },
            ("allenai/ai2_arc", "ARC-Challenge", "train", None),
        ),
        (
            "scitldr",
            "test",
            {"source": ["One."], "target": ["Short."]},
            ("allenai/scitldr", "Abstract", "test", "refs/convert/parquet"),
        ),
        (
            "trivia_qa",
            "train",
            {"question": "q", "answer": {"value": "v", "aliases": ["w"], "type": ""}},
            ("mandarjoshi/trivia_qa", "unfiltered.nocontext", "train", None),
        ),
        (
            "wsc",
            "train",
            {
                "text": "a b",
                "span1_index": 0,
                "span1_text": "a",
                "span2_index": 1,
                "span2_text": "b",
                "label": 1,
            },
            ("aps/super_glue", "wsc.fixed", "train", None),
        ),
    ],
)
def test_the_right_split_of_the_hub_is_read(stand_in, task, split, record, expected_call):
    calls, answers = stand_in
    answers.append(record)
    (example,) = read_examples(find_task(task), split)
    assert calls == [expected_call]
    assert example.input.isascii()
    assert example.target


def test_an_unreachable_hub_is_an_error(stand_in):
    stand_in[1].append(ConnectionError("no route to the host"))
    with pytest.raises(DataError, match=r"Cannot read the train split of 'rte'.*no route.*--data"):
        read_examples(find_task("rte"), "train")


def test_the_hub_without_its_extra_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"'rte'.*--data PATH.*switchlm\[hub\]"):
        read_examples(find_task("rte"), "train")


def test_a_task_that_is_not_on_the_hub_is_an_error():
    with pytest.raises(DataError, match="not on the hub"):
        read_examples(Task(name="x", input="{a}", metrics=("f1",)), "train")
