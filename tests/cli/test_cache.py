"""switchlm cache, and the options that place and limit the caches."""

import os
import shutil

import pytest

from switchlm.data.config import DataConfig
from switchlm.data.pretraining.loader import open_data


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A folder with the tokens of three texts, used one hour after the other."""
    folder = tmp_path / "cache"
    for number in range(3):
        text = tmp_path / f"text{number}.txt"
        text.write_text(f"Words of text {number}. " * 200 * (number + 1))
        open_text(text, folder)
        for made in folder.glob("tokens-*/manifest.json"):
            if made.stat().st_mtime > 10_000:
                os.utime(made, (3600 * number, 3600 * number))
    return folder


def open_text(text, folder, report=None, **settings):
    config = DataConfig(
        sources=(str(text),), input_length=32, batch_size=2, cache=str(folder), **settings
    )
    return open_data(config, seed=0, report=report)


def sources(found):
    return [os.path.basename(entry["what"]) for entry in found["entries"]]


def test_it_lists_the_last_used_first(run_json, cache):
    found = run_json("cache", "--cache", cache)
    assert sources(found) == ["text2.txt", "text1.txt", "text0.txt"]
    assert found["entries"][0]["tokens"] == len("Words of text 2. ") * 600 + 1
    assert found["bytes"] == sum(entry["size"] for entry in found["entries"])
    assert not found["deleted"]


def test_what_cannot_be_used_is_one_line(run_json, run, cache):
    """Nothing is damaged at first; then a copy that is cut, and others without a good manifest."""
    whole = run("cache", "--cache", cache).output
    assert "damaged" not in whole
    first = next(cache.glob("tokens-*/manifest.json")).parent
    size = run_json("cache", "--cache", cache)["bytes"]
    contents = {
        "cut": (first / "manifest.json").read_bytes(),
        "old": b'{"dtype": "uint16", "skipped": ""}',
        "odd": b"[" * 100_000,
        "list": b'{"files": [], "source": "a", "tokens": 3}',
        "empty": b"",
    }
    for name, content in contents.items():
        shutil.copytree(first, cache / f"tokens-{name}")
        (cache / f"tokens-{name}" / "manifest.json").write_bytes(content)
        (cache / f"tokens-{name}" / "tokens.bin").write_bytes(b"123")
    (cache / "tokens-unfinished").mkdir()
    found = run_json("cache", "--cache", cache)
    readable = [entry for entry in found["entries"] if entry["readable"]]
    assert (len(readable), len(found["entries"])) == (3, 9)
    assert sum(entry["size"] for entry in readable) == size
    shown = run("cache", "--cache", cache).output
    (line,) = [line for line in shown.splitlines() if "damaged" in line]
    assert line == (
        "Token caches that are unfinished, damaged or of an earlier version: 6, "
        f"{(found['bytes'] - size) / 1e6:,.1f} MB."
    )
    assert shown.splitlines()[:4] == whole.splitlines()[:4]
    assert "Deleted 9 of them" in run("cache", "--clear", "--cache", cache).output


def test_opening_a_cache_is_a_use(run_json, cache, tmp_path):
    open_text(tmp_path / "text0.txt", cache)
    assert sources(run_json("cache", "--cache", cache))[0] == "text0.txt"


def test_those_used_longest_ago_are_deleted(run_json, run, cache):
    sizes = [entry["size"] for entry in run_json("cache", "--cache", cache)["entries"]]
    found = run_json("cache", "--cache", cache, "--keep", f"{sizes[0] + sizes[1]}B")
    assert (sources(found), len(found["deleted"])) == (["text2.txt", "text1.txt"], 1)
    result = run("cache", "--clear", env={"SWITCHLM_CACHE": str(cache)})
    assert "Deleted 2 of them" in result.output
    assert not list(cache.glob("tokens-*"))


def test_a_new_cache_takes_the_place_of_old_ones_within_the_limit(run_json, cache, tmp_path):
    sizes = [entry["size"] for entry in run_json("cache", "--cache", cache)["entries"]]
    text = tmp_path / "new.txt"
    text.write_text("Words of another text. " * 400)
    lines = []
    open_text(text, cache, lines.append, cache_limit=f"{sum(sizes)}B")
    found = run_json("cache", "--cache", cache)
    assert sources(found)[0] == "new.txt"
    assert "text0.txt" not in sources(found)
    assert found["bytes"] <= sum(sizes)
    assert any("Deleted the cache of" in line for line in lines)
    open_text(text, cache, lines.append, cache_limit="10B")
    assert sources(run_json("cache", "--cache", cache)) == ["new.txt"]
    assert "more than data.cache_limit 10B" in lines[-1] or any(
        "more than data.cache_limit 10B" in line for line in lines
    )


def test_mistakes_are_refused(refuse, cache, run_json):
    assert "not a size" in refuse("cache", "--cache", cache, "--keep", "many")
    assert "give one" in refuse("cache", "--clear", "--keep", "1GB")
    assert run_json("cache", "--cache", cache / "missing")["entries"] == []


def test_training_takes_the_folder_of_the_option(run, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Words of a text. " * 300)
    arguments = (
        *("pretrain", "--preset", "nano", "--data", text, "--out", tmp_path / "run"),
        *("--cache", tmp_path / "elsewhere", "--set", "training.steps=1"),
        *("--set", "data.input_length=32", "--set", "data.batch_size=2"),
    )
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert list((tmp_path / "elsewhere").glob("tokens-*"))
    assert not list((tmp_path / ".cache").glob("switchlm/tokens-*"))
