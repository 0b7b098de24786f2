import gzip
import json
import sys
import types
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from switchlm.data.config import Columns
from switchlm.data.text import readers
from switchlm.data.text.readers import read_file, read_hub
from switchlm.errors import DataError, MissingExtraError


def read(path, column="text", group=None, alone=False):
    skipped = Counter()
    documents = list(
        read_file(path, path.name, Columns(text=column, group=group), alone=alone, skipped=skipped)
    )
    return documents, dict(skipped)


def texts(path, **settings):
    return [document.text for document in read(path, **settings)[0]]


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def test_a_text_file_is_one_document(tmp_path):
    path = tmp_path / "a.py"
    path.write_bytes("\ufeffgrüße\r\n\n".encode())
    assert texts(path) == ["grüße\r\n\n"]


@pytest.mark.parametrize(("raw", "reason"), [(b"caf\xe9", "not UTF-8"), (b"a\0b", "binary")])
def test_a_file_that_is_not_text_is_skipped_and_counted(tmp_path, raw, reason):
    path = tmp_path / "a.txt"
    path.write_bytes(raw)
    assert read(path) == ([], {reason: 1})


@pytest.mark.parametrize("alone", [True, False])
def test_a_large_file_is_cut_at_line_ends_and_nothing_is_lost(tmp_path, alone, monkeypatch):
    monkeypatch.setattr(readers, "WHOLE", 1000)
    monkeypatch.setattr(readers, "SECTION", 100)
    text = "".join(f"line {number} äöü\n" for number in range(200))
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8")
    documents, skipped = read(path, alone=alone)
    assert "".join(document.text for document in documents) == text
    assert all(document.text.endswith("\n") for document in documents)
    assert len(documents) > 10
    assert not skipped
    # Sections of one file among many stay together at the held-out split.
    assert {document.group for document in documents} == {"" if alone else "a.txt"}


@given(st.text(st.characters(exclude_characters="\0\ufeff", codec="utf-8"), max_size=80))
def test_no_cut_falls_inside_a_character(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("cut") / "a.txt"
    path.write_bytes(text.encode("utf-8"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "SECTION", 4)
        documents, skipped = read(path, alone=True)
    assert "".join(document.text for document in documents) == text
    assert not skipped


def test_a_file_that_ends_inside_a_character_is_counted(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"gut\n" + "é".encode()[:1])
    assert read(path, alone=True)[1] == {"not UTF-8": 1}


def test_json_lines_plain_and_compressed(tmp_path):
    raw = lines({"text": "one"}, {"text": "two\n2"})
    (tmp_path / "a.jsonl").write_bytes(raw)
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(raw))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(raw))
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"plain"))
    for name in ("a.jsonl", "a.jsonl.zst", "a.jsonl.gz"):
        assert texts(tmp_path / name) == ["one", "two\n2"]
    assert texts(tmp_path / "a.txt.zst") == ["plain"]


def test_bad_records_are_skipped_and_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        lines({"text": "one"}, {"text": None}, {"other": 1}, [1], {"text": "\ud800"})
        + b'\n{"text": \n{"text": "\xff"}\n'
        + lines({"text": "two"})
    )
    documents, skipped = read(path)
    assert [document.text for document in documents] == ["one", "two"]
    assert skipped == {"without text in 'text'": 3, "not UTF-8": 2, "not JSON": 1}


def test_deep_json_is_skipped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"text": "one"}) + b"[" * 100_000 + b"\n")
    assert read(path)[1] == {"not JSON": 1}


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["one", None, "two"], "id": [1, 2, 3]}), path)
    documents, skipped = read(path, column="body")
    assert [document.text for document in documents] == ["one", "two"]
    assert skipped == {"without text in 'body'": 1}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_records_have_the_group_that_a_column_names(tmp_path, kind):
    records = [{"text": "a", "doc": 7}, {"text": "b", "doc": "x"}, {"text": "c", "doc": None}]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_bytes(lines(*records))
    else:
        columns = {"text": ["a", "b", "c"], "doc": ["7", "x", None]}
        pq.write_table(pa.table(columns), path)
    documents, skipped = read(path, group="doc")
    assert [(one.text, one.group) for one in documents] == [("a", "7"), ("b", "x")]
    assert skipped == {"without a group in 'doc'": 1}
    with pytest.raises(DataError, match=r"no column 'page'; it has: text, doc.*group_column"):
        read(path, group="page")


def test_a_missing_column_names_those_that_are_there(tmp_path):
    pq.write_table(pa.table({"body": ["one"], "id": [1]}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_bytes(lines({"body": "one", "id": 1}))
    for name in ("a.parquet", "a.jsonl"):
        with pytest.raises(DataError, match="has no column 'text'; it has: body, id"):
            read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.parquet", "a.txt.gz", "a.jsonl.zst"])
def test_damaged_files_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x28\xb5\x2f\xfd this is not what the name says")
    with pytest.raises(DataError, match="Cannot"):
        read(tmp_path / name)


def test_truncated_gzip_is_refused(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text" * 1000)[:-20])
    with pytest.raises(DataError, match="Cannot read"):
        read(tmp_path / "a.txt.gz")


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [("a.parquet", "pyarrow", "data"), ("a.txt.zst", "zstandard", "data")],
)
def test_a_missing_extra_is_named(tmp_path, monkeypatch, name, module, extra):
    (tmp_path / name).write_bytes(b"")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"{module}.*switchlm\[{extra}\]"):
        read(tmp_path / name)


def test_the_hub_without_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"switchlm\[hub\]"):
        list(read_hub("hub:org/name", Columns(), Counter()))


@pytest.mark.parametrize(
    ("location", "expected_call"),
    [
        ("hub:org/name", ("org/name", None, "train")),
        ("hub:org/name:test", ("org/name", None, "test")),
        ("hub:org/name:en:test", ("org/name", "en", "test")),
    ],
)
def test_hub_datasets_are_streamed(monkeypatch, location, expected_call):
    calls = []

    def load_dataset(name, config, *, split, streaming):
        calls.append((name, config, split))
        assert streaming
        return iter([{"text": "one"}, {"text": None}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    skipped = Counter()
    documents = list(read_hub(location, Columns(), skipped))
    assert [document.text for document in documents] == ["one"]
    assert calls == [expected_call]
    assert skipped == {"without text in 'text'": 1}


@pytest.mark.parametrize("location", ["hub:", "hub:a:b:c:d"])
def test_a_hub_source_that_cannot_be_read_is_refused(monkeypatch, location):
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace())
    with pytest.raises(DataError, match="write hub:NAME"):
        list(read_hub(location, Columns(), Counter()))
