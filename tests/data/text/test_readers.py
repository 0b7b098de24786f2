import gzip
import json
import sys
import tracemalloc
from collections import Counter

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from switchlm.data.config import Columns
from switchlm.data.text import readers
from switchlm.data.text.readers import read_file
from switchlm.errors import DataError, MissingExtraError


def read(path, column="text", group=None, alone=False):
    skipped = Counter()
    documents = list(
        read_file(path, Columns(text=column, group=group), alone=alone, skipped=skipped)
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
    assert {document.group for document in documents} == {""}


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


@pytest.mark.parametrize("suffix", ["csv", "tsv", "csv.gz", "tsv.zst"])
def test_tables_are_read_by_column_as_pandas_does(tmp_path, suffix):
    frame = pandas.DataFrame(
        {
            "id": [1, 2, 3, 4],
            "text": ['quoted "so", yes', "two\nlines\t\r\n", "x" * 300_000, "grüße \u2028 ☃"],
        }
    )
    path = tmp_path / f"a.{suffix}"
    separator = "\t" if "tsv" in suffix else ","
    frame.to_csv(path, index=False, sep=separator)
    again = pandas.read_csv(path, sep=separator, keep_default_na=False)
    assert texts(path) == again["text"].tolist() == frame["text"].tolist()
    with pytest.raises(DataError, match=r"has no column 'body'; it has: id, text.*text_column"):
        read(path, column="body")


def test_a_row_with_a_byte_that_is_not_utf8_is_counted(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbftext,n\r\none,1\r\ncaf\xe9,2\r\n,3\r\nnull\0,4\r\nlast\r\n")
    documents, skipped = read(path)
    assert [document.text for document in documents] == ["one", "", "null\0", "last"]
    assert skipped == {"not UTF-8": 1}


def test_json_lists_and_objects_per_line_are_records_and_other_json_is_text(tmp_path):
    records = [{"text": "one", "n": 1}, {"text": "two\n"}]
    (tmp_path / "a.json").write_text(json.dumps(records, indent=1))
    (tmp_path / "b.json").write_bytes(lines(*records))
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(lines(*records)))
    for name in ("a.json", "b.json", "c.json.gz"):
        assert texts(tmp_path / name) == ["one", "two\n"]
    for number, plain in enumerate(('{\n "a": 1\n}', "[1, 2]", '"word"', "{", "")):
        path = tmp_path / f"plain{number}.json"
        path.write_text(plain)
        assert texts(path) == [plain]
    (tmp_path / "d.json").write_text('[{"text": "cut"')
    with pytest.raises(DataError, match=r"d\.json is not valid JSON"):
        read(tmp_path / "d.json")
    with pytest.raises(DataError, match="has no column 'body'; it has: text, n"):
        read(tmp_path / "a.json", column="body")


def test_a_line_without_end_takes_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_LINE", 2**16)
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb") as file:
        file.write(b'{"text": "' + b"0" * 2**25 + b'"}\n' + lines({"text": "after"}))
    tracemalloc.start()
    documents, skipped = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [document.text for document in documents] == ["after"]
    assert skipped == {"longer than 0 MiB": 1}
    assert peak < 2**22


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
