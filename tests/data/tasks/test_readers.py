"""Files as people have them: damaged records, empty cells, and the CSV that pandas reads."""

import json
import re

import pytest

from switchlm.data.tasks.mixture import EVERYTHING, TaskOptions, find_task, read_examples
from switchlm.errors import DataError


@pytest.fixture
def read(tmp_path):
    """Return a function from a file to (its (input, target) pairs, what was reported)."""

    def read(name, content, **options):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        task = find_task(str(path), TaskOptions(**options))
        lines = []
        examples = read_examples(task, EVERYTHING, report=lines.append)
        return [(one.input, one.target) for one in examples], lines

    return read


@pytest.mark.parametrize(
    "content",
    [
        "input,target\n" + "x" * 200_000 + ",a\n",
        'input,target\n"a ""quoted"" word,\nand a line","b"\n',
        "\ufeffinput,target\r\na,b\r\n\r\nc,d\r\n",
        "input,target\ra,b\r",
        'input,target\n"a"x,5" pipe\n',
        "input,target\n  a  ,b\n   \nc,d\n",
        "target,id,input\nb,1,a\n",
        "input,target\na\u2028b,\x0bc\n",
        "input,target\na,\n,b\n",
        "input,target\nNA,null\n",
    ],
    ids=[
        *("a long cell", "quotes", "bom and crlf", "cr", "quotes within", "spaces", "columns"),
        *("other separators", "empty", "words for null"),
    ],
)
def test_a_csv_is_what_pandas_reads(read, tmp_path, content):
    pandas = pytest.importorskip("pandas")
    pairs, _ = read("mine.csv", content)
    table = pandas.read_csv(tmp_path / "mine.csv", keep_default_na=False, dtype=str)
    expected = [
        (i.strip(), t.strip()) for i, t in zip(table["input"], table["target"], strict=True)
    ]
    assert pairs == expected


def test_null_bytes_and_control_characters_are_text(read):
    assert read("mine.csv", "input,target\na\0b,c\n")[0] == [("a\0b", "c")]
    lines = '{"input": "a\0b\tc", "target": "d\\u0000"}\n'
    assert read("mine.jsonl", lines)[0] == [("a\0b\tc", "d\0")]


def test_utf_16_of_a_spreadsheet_is_read(read):
    assert read("mine.tsv", "input\ttarget\r\né\tb\r\n".encode("utf-16"))[0] == [("é", "b")]


GOOD = '{"input": "a", "target": "b"}\n'


@pytest.mark.parametrize(
    ("name", "good", "bad", "why"),
    [
        ("mine.jsonl", GOOD, '{"input": "café", "target": "b"}\n', "record 20 of .*not UTF-8"),
        ("mine.jsonl", GOOD, '{"input": "a", "tar\n', "line 20 of .*is not JSON"),
        ("mine.jsonl", GOOD, '{"input": "a", "target": "\\ud800"}\n', "record 20 of .*not UTF-8"),
        (
            "mine.jsonl",
            GOOD,
            '{"input": "a", "target": ' + "9" * 5000 + "}\n",
            "line 20",
        ),
        ("mine.csv", "a,b\n", "é,b\n", "record 20 of .*is not UTF-8"),
        ("mine.csv", "a,b\n", "a,b,c\n", "row 21 of .*has 3 columns"),
        ("mine.tsv", "a\tb\n", "a\n", "row 21 of .*has 1 columns"),
    ],
)
def test_an_unreadable_record_is_left_out_and_said_and_many_are_refused(read, name, good, bad, why):
    head = {"mine.csv": "input,target\n", "mine.tsv": "input\ttarget\n"}.get(name, "")
    content = (head + 19 * good + bad + 9 * good).encode("latin-1")
    pairs, (line,) = read(name, content)
    assert pairs == [("a", "b")] * 28
    assert f"{name}: Records that cannot be read and are left out: 1; " in line
    assert re.search(why, line)
    many = (head + 19 * good + 5 * bad).encode("latin-1")
    with pytest.raises(DataError, match=f"5 of 24 records .* cannot be read: {why}"):
        read(name, many)


def test_a_bad_byte_in_a_column_that_is_not_read_does_not_matter(read):
    content = b'{"input": "a", "target": "b", "author": "Andr\xe9"}\n'
    assert read("mine.jsonl", content) == ([("a", "b")], [])


def test_a_quotation_mark_that_is_not_closed_is_refused(read):
    with pytest.raises(DataError, match="a quotation mark opens a cell that none closes: 'c,d"):
        read("mine.csv", 'input,target\na,b\n"c,d\n' + "e,f\n" * 50)
    assert read("mine.csv", 'input,target\na,"b\n"\n')[0] == [("a", "b")]


@pytest.mark.parametrize("empty", ["", "  ", None, float("nan"), []])
def test_an_empty_target_is_the_end_token_alone_or_left_out(read, empty):
    records = [{"input": "a", "target": "b"}, {"input": "c", "target": empty}]
    content = "".join(json.dumps(record) + "\n" for record in records)
    pairs, (line,) = read("mine.jsonl", content)
    assert pairs == [("a", "b"), ("c", "")]
    assert "mine.jsonl: Empty targets: 1, the end token alone (--skip-empty" in line
    pairs, (line,) = read("mine.jsonl", content, skip_empty=True)
    assert pairs == [("a", "b")]
    assert "mine.jsonl: Empty records that are left out: 1." in line


def test_a_null_among_several_answers_is_no_answer(read):
    pairs, _ = read("mine.jsonl", '{"input": "a", "target": [null, "b", ""]}\n')
    assert pairs == [("a", "b")]


def test_labels_of_a_users_file_are_their_numbers_or_texts(read):
    table = "text,stars\nfine,1\nbad,0\nso,good\n"
    options = {"input_column": "text", "target_column": "stars", "labels": ("poor", "good")}
    assert read("mine.csv", table, **options)[0] == [
        ("fine", "good"),
        ("bad", "poor"),
        ("so", "good"),
    ]
    with pytest.raises(DataError, match=r"label 'goood'.*Did you mean 'good'"):
        read("mine.csv", table + "x,goood\n", **options)
    with pytest.raises(DataError, match="has no label"):
        read("mine.csv", table + "x,\n", **options)
    assert len(read("mine.csv", table + "x,\n", **options, skip_empty=True)[0]) == 3


def test_questions_of_squad_2_without_an_answer_have_an_empty_one(tmp_path):
    questions = [
        {"question": "q", "answers": [{"text": "a", "answer_start": 0}], "is_impossible": False},
        {"question": "r", "answers": [], "is_impossible": True},
    ]
    data = {"data": [{"paragraphs": [{"context": "c", "qas": questions}]}]}
    (tmp_path / "dev-v2.0.json").write_text(json.dumps(data))
    found = read_examples(find_task("squad"), "validation", tmp_path)
    assert [(one.target, one.references) for one in found] == [("a", ("a",)), ("", ("",))]
    skipping = find_task("squad", TaskOptions(skip_empty=True))
    assert len(read_examples(skipping, "validation", tmp_path)) == 1
    hub = {"context": "c", "question": "r", "answers": {"text": [], "answer_start": []}}
    (tmp_path / "dev-v2.0.json").unlink()
    (tmp_path / "dev.jsonl").write_text(json.dumps(hub))
    assert read_examples(find_task("squad"), "validation", tmp_path)[0].references == ("",)
