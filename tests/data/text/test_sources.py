import sys
from collections import Counter
from pathlib import Path

import pytest

from switchlm.data.config import Columns
from switchlm.data.text.sources import Source, files, parse, parse_all, read
from switchlm.errors import DataError


def names(text):
    return [name for name, _ in files(parse(text))]


def texts(text, **settings):
    skipped = Counter()
    settings = {"columns": Columns(), "max_documents": None} | settings
    found = [document.text for document in read(parse(text), skipped=skipped, **settings)]
    return found, dict(skipped)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("texts/en", Source(name="en", location="texts/en")),
        ("texts/en:0.7", Source(name="en", location="texts/en", weight=0.7)),
        ("fr=a.txt:2", Source(name="fr", location="a.txt", weight=2.0)),
        ("texts/*.txt", Source(name="texts", location="texts/*.txt")),
        ("python:stdlib", Source(name="stdlib", location="python:stdlib")),
        ("py=python:stdlib:1e-1", Source(name="py", location="python:stdlib", weight=0.1)),
        ("hub:org/c4:en:train", Source(name="c4", location="hub:org/c4:en:train")),
        ("hub:org/c4:0.5", Source(name="c4", location="hub:org/c4", weight=0.5)),
    ],
)
def test_a_source_is_read_as_it_is_written(text, expected):
    assert parse(text) == expected


def test_a_file_that_exists_is_taken_with_its_colon(tmp_path):
    path = tmp_path / "a=b:7"
    path.write_text("text")
    assert parse(str(path)).location == str(path)
    assert parse(str(path)).weight is None


@pytest.mark.parametrize("text", ["a.txt:0", "a.txt:-1"])
def test_weights_must_be_positive(text):
    with pytest.raises(DataError, match="must be positive"):
        parse(text)


def test_names_that_collide_get_numbers():
    assert [source.name for source in parse_all(["a/en", "b/en", "en=c"])] == ["en", "en-2", "en-3"]


def test_no_source_and_an_empty_one_are_refused():
    with pytest.raises(DataError, match="no data sources"):
        parse_all([])
    with pytest.raises(DataError, match="Cannot read the data source"):
        parse_all([""])


def test_a_folder_is_walked_in_order_without_hidden_files(tmp_path):
    for name in ("b/2.txt", "b/1.txt", "a.md", ".hidden", ".git/x", "__pycache__/y.pyc"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    assert names(str(tmp_path)) == ["a.md", "b/1.txt", "b/2.txt"]
    assert len(names(f"{tmp_path}/b/*.txt")) == 2
    assert len(names(f"{tmp_path}/**/*.txt")) == 2


@pytest.mark.parametrize("text", ["nowhere", "en=nowhere:heavy", "python:wheels", "nowhere/*.txt"])
def test_what_is_not_there_is_refused(text):
    with pytest.raises(DataError, match=r"There is no|has no files"):
        files(parse(text))


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="has no files"):
        files(parse(str(tmp_path)))


def test_the_standard_library_is_python_text_without_installed_packages():
    found = files(parse("python:stdlib"))
    assert len(found) > 500
    assert all(path.suffix == ".py" for _, path in found)
    assert not any("site-packages" in path.parts for _, path in found)
    assert any(path.samefile(sys.modules["os"].__file__) for name, path in found if name == "os.py")


def test_site_packages_have_what_is_installed():
    assert any(name.startswith("pytest") for name in names("python:site-packages"))


def test_empty_texts_are_counted_and_max_documents_stops(tmp_path):
    for number, text in enumerate(["one", "", " \n", "two", "three"]):
        (tmp_path / f"{number}.txt").write_text(text)
    assert texts(str(tmp_path)) == (["one", "two", "three"], {"empty": 2})
    assert texts(str(tmp_path), max_documents=2)[0] == ["one", "two"]


def test_a_relative_file_is_found(tmp_path, monkeypatch):
    Path(tmp_path / "a.txt").write_text("hello")
    monkeypatch.chdir(tmp_path)
    assert texts("a.txt")[0] == ["hello"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("news.*.txt", ["afr", "por-BR"]),
        ("n*.txt", ["news.afr", "news.por-BR"]),
        ("*", ["news.afr", "news.por-BR", "talk"]),
        ("", ["news.afr", "news.por-BR", "talk"]),
        ("[a-z]*.afr.txt", ["news"]),
    ],
)
def test_each_file_may_be_a_source_named_by_what_differs(tmp_path, pattern, expected):
    for name in ("news.afr.txt", "news.por-BR.txt", ".hidden"):
        (tmp_path / name).write_text("text")
    (tmp_path / "talk").mkdir()
    (tmp_path / "talk" / "a.txt").write_text("text")
    found = parse_all([f"each:{tmp_path}/{pattern}".rstrip("/")])
    assert [source.name for source in found] == expected
    assert all(files(source) for source in found)


def test_each_takes_a_name_and_a_weight(tmp_path):
    for name in ("en.jsonl.gz", "de.txt"):
        (tmp_path / name).write_text("text")
    found = parse_all([f"web=each:{tmp_path}/*:0.5", "python:stdlib:1"])
    assert [(source.name, source.weight) for source in found] == [
        ("web-de", 0.5),
        ("web-en", 0.5),
        ("stdlib", 1.0),
    ]


def test_each_of_nothing_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no files for 'each:.*give a folder or a glob"):
        parse_all([f"each:{tmp_path}/*.txt"])
