"""The named tasks of tasks.yaml, and the functions that preprocess their records.

`flatten` in tasks.yaml names a function here. It takes a record of the task's files or of the hub,
and yields records with plain columns; records with the same `identity` stay in the same split.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.resources import files
from typing import Any

import yaml

from switchlm.config import from_mapping
from switchlm.data.tasks.task import Record, Task

_MARKS = (("span1", "*"), ("span2", "#"))  # of WSC: a noun, and a pronoun that may mean it


def squad(record: Record) -> Iterator[Record]:
    """An article with paragraphs with questions, or one question; its paragraph is the identity."""
    for paragraph in record.get("paragraphs", ()):
        for question in paragraph["qas"]:
            yield from squad({**question, "context": paragraph["context"]})
    if "paragraphs" not in record:
        yield {**record, "identity": record.get("context", "")}


def multirc(record: Record) -> Iterator[Record]:
    """A passage with questions with answers, or one answer; its question is the identity."""
    passage = record.get("passage")
    if not isinstance(passage, dict):
        index = record.get("idx", {})
        yield {**record, "identity": f"multirc/{index.get('paragraph')}/{index.get('question')}"}
        return
    for number, question in enumerate(passage["questions"]):
        for answer in question["answers"]:
            yield {
                "paragraph": passage["text"],
                "question": question["question"],
                "answer": answer["text"],
                "label": answer.get("label"),
                "identity": f"multirc/{record.get('idx')}/{question.get('idx', number)}",
            }


def record(record: Record) -> Iterator[Record]:
    """A passage with queries, or one query; entities are listed once, highlights marked as text."""
    passage = record.get("passage")
    if not isinstance(passage, dict):
        rows = [record]
    else:
        text = passage["text"]
        entities = [text[span["start"] : span["end"] + 1] for span in passage["entities"]]
        rows = [
            {
                "passage": text,
                "query": query["query"],
                "entities": entities,
                "answers": [answer["text"] for answer in query.get("answers", ())],
            }
            for query in record["qas"]
        ]
    for row in rows:
        changes: Record = {"passage": re.sub(r"\s*@highlight\s*", " ", str(row.get("passage", "")))}
        if isinstance(row.get("entities"), list):
            changes["entities"] = ", ".join(dict.fromkeys(row["entities"]))
        if isinstance(row.get("answers"), list):
            changes["answers"] = list(dict.fromkeys(row["answers"]))
        yield {**row, **changes}


def wsc(record: Record) -> Iterator[Record]:
    """Mark the noun with * and the pronoun with # in the text, as T5 does."""
    spans = {**record, **record.get("target", {})}
    words = str(spans.get("text", "")).split(" ")
    marks = [(int(spans.get(f"{span}_index", 0)), span, mark) for span, mark in _MARKS]
    for start, span, mark in sorted(marks, reverse=True):  # the last one first
        end = start + len(str(spans.get(f"{span}_text", "")).split(" "))
        words[start:end] = [mark, *words[start:end], mark]
    yield {**record, "marked": " ".join(words)}


def multiple_choice(record: Record) -> Iterator[Record]:
    """ARC: a question with its choices lettered (A), (B), ..., whatever their labels."""
    question = record.get("question")
    stem, choices = (
        (question.get("stem"), question.get("choices"))
        if isinstance(question, dict)
        else (question, record.get("choices"))
    )
    if isinstance(choices, dict):  # columns, as the hub gives them
        choices = [
            {"text": text, "label": label}
            for text, label in zip(choices["text"], choices["label"], strict=True)
        ]
    letters = {choice["label"]: chr(ord("A") + n) for n, choice in enumerate(choices or ())}
    listed = [f"({letters[choice['label']]}) {choice['text']}" for choice in choices or ()]
    key = record.get("answerKey")
    yield {**record, "question": stem, "choices": listed, "label": letters.get(key, key)}


def trivia_qa(record: Record) -> Iterator[Record]:
    """The answer and its aliases as one list, the answer itself first."""
    answer = record.get("answer") or record.get("Answer") or {}
    names = {key.lower(): value for key, value in answer.items()}
    answers = [names.get("value", ""), *names.get("aliases", ())]
    yield {**record, "answers": [one for one in dict.fromkeys(answers) if one]}


def similarity(record: Record) -> Iterator[Record]:
    """STS-B: the score rounded to a fifth, so that it is one of 26 strings."""
    score = record.get("score", record.get("label"))
    try:
        yield {**record, "similarity": f"{round(float(str(score)) * 5) / 5:.1f}"}
    except ValueError:
        yield record


_FLATTEN = {
    function.__name__: function
    for function in (squad, multirc, record, wsc, multiple_choice, trivia_qa, similarity)
}


def _named(name: str, fields: Mapping[str, Any]) -> Task:
    plain = {key: value for key, value in fields.items() if key != "flatten"}
    task = from_mapping(Task, {"name": name, **plain}, name)
    return replace(task, flatten=_FLATTEN[fields["flatten"]]) if "flatten" in fields else task


_FILE = yaml.safe_load(files("switchlm.data.tasks").joinpath("tasks.yaml").read_text("utf-8"))
GROUPS: dict[str, tuple[Task, ...]] = {
    group: tuple(_named(name, fields) for name, fields in tasks.items())
    for group, tasks in _FILE["tasks"].items()
}
TASKS = {task.name: task for tasks in GROUPS.values() for task in tasks}
MIXTURES: dict[str, tuple[str, ...]] = {
    name: tuple(names) for name, names in _FILE["mixtures"].items()
}
