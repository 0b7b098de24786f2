"""The folder of a comparison: replaced at the end, and only if all in it is ours."""

import json
from pathlib import Path

import pytest

from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import CheckpointError, ConfigError
from switchlm.parallel.mesh import ALONE
from switchlm.recipes.compare import _place
from switchlm.recipes.config import run_config, to_sections
from switchlm.recipes.start import open_run

SECTIONS = to_sections(run_config(preset="nano", sources=["a"]))


def write(out: Path, word: str, *, overwrite: bool = False, fail: bool = False) -> None:
    with _place(out, overwrite) as folder:
        for name in ("dense", "sparse"):
            with open_run(folder / name, False, ALONE) as run:
                run.begin({"config.yaml": SECTIONS}, Tokenizer.bytes(), text="")
        if fail:
            raise RuntimeError
        (folder / "compare.json").write_text(json.dumps(word))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_comparison_is_replaced_by_a_finished_one(tmp_path: Path) -> None:
    out = tmp_path / "race"
    write(out, "old")
    with pytest.raises(ConfigError, match="holds an earlier comparison"):
        write(out, "new")
    with pytest.raises(RuntimeError):
        write(out, "new", overwrite=True, fail=True)
    assert (out / "compare.json").read_text() == '"old"'
    write(out, "new", overwrite=True)
    assert (out / "compare.json").read_text() == '"new"'
    assert names(out) == [".switchlm.json", "compare.json", "dense", "sparse"]
    assert names(tmp_path) == ["race"]


def test_one_that_was_stopped_is_replaced_too(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        write(tmp_path, "old", fail=True)
    write(tmp_path, "new", overwrite=True)
    assert (tmp_path / "compare.json").read_text() == '"new"'


@pytest.mark.parametrize(
    ("name", "named"),
    [
        (".git/config", "'.git'"),
        ("main.py", "'main.py'"),
        ("dense/notes.txt", "'dense/notes.txt'"),
        ("dense/model/mine", "'mine'"),
    ],
)
def test_files_of_the_user_are_not_replaced(tmp_path: Path, name: str, named: str) -> None:
    write(tmp_path, "old")
    mine = tmp_path / name
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text("years of work")
    with pytest.raises((ConfigError, CheckpointError), match=named):
        write(tmp_path, "new", overwrite=True)
    assert mine.read_text() == "years of work"
    assert (tmp_path / "compare.json").read_text() == '"old"'


@pytest.mark.parametrize("marker", [None, "[]", "[" * 100_000, '{"kind": "model"}'])
def test_a_folder_that_only_looks_like_one_is_not_replaced(
    tmp_path: Path, marker: str | None
) -> None:
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "matrix.npy").write_text("years of work")
    if marker is not None:
        (tmp_path / "compare.json").write_text(marker)
    with pytest.raises(ConfigError, match="contains no comparison"):
        write(tmp_path, "new", overwrite=True)
    assert (tmp_path / "dense" / "matrix.npy").exists()


def test_a_start_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), _place(tmp_path / "race", False):
        raise RuntimeError
    assert names(tmp_path) == []


def test_one_comparison_at_a_time(tmp_path: Path) -> None:
    with _place(tmp_path / "race", False), pytest.raises(ConfigError, match=r"^Process"):
        write(tmp_path / "race", "new", overwrite=True)
