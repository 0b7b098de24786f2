import errno
import fcntl
import json
import os
from pathlib import Path

import pytest

from switchlm import files
from switchlm.errors import CheckpointError, DataError
from switchlm.files import (
    MANIFEST,
    building,
    changed_folder,
    check_replaceable,
    finite,
    new_folder,
    remove_folder,
    replace_file,
    to_json,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def silent(line):
    pass


def test_a_file_appears_when_it_is_complete(tmp_path):
    with building(tmp_path / "folder" / "file", silent) as part:
        part.write_text("all of it")
        assert not (tmp_path / "folder" / "file").exists()
    assert (tmp_path / "folder" / "file").read_text() == "all of it"


def test_a_failure_leaves_what_was_there(tmp_path):
    final = tmp_path / "file"
    final.write_text("old")

    def fail():
        with building(final, silent) as part:
            part.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert final.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_leftovers_of_dead_processes_are_removed(tmp_path):
    left, others = "file.part-0123dead", ["file.part-one", "other.part-0123dead"]
    for name in (left, *others):
        (tmp_path / name).mkdir()
    with building(tmp_path / "file", silent):
        pass
    assert names(tmp_path) == others


def test_a_full_disk_is_a_clear_error(tmp_path):
    with (
        pytest.raises(DataError, match="No space left on device"),
        building(tmp_path / "file", silent),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_without_locks_the_first_rename_wins(tmp_path, monkeypatch):
    def no_locks(file, operation):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    final = tmp_path / "made"
    with building(final, silent) as slow:
        slow.mkdir()
        (slow / "by").write_text("slow")
        with building(final, silent) as quick:
            assert slow.exists()
            quick.mkdir()
            (quick / "by").write_text("quick")
    assert (final / "by").read_text() == "quick"
    assert names(tmp_path) == ["made"]


def test_a_waiting_process_reports_it(tmp_path, monkeypatch):
    lines = []
    real = fcntl.flock

    def busy_at_first(file, operation):
        if operation & fcntl.LOCK_NB:
            raise BlockingIOError
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", busy_at_first)
    with building(tmp_path / "file", lines.append):
        pass
    assert lines == ["Waiting for another process that prepares the same text."]


def test_all_files_are_synced_before_the_rename(tmp_path, monkeypatch):
    """Against a loss of power: first the files, then their folder, last the parent folder."""
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda file: (done.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file))
    )
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append("renamed"), replace(old, new)))
    with building(tmp_path / "made", silent) as part:
        part.mkdir()
        (part / "one").write_text("1")
        (part / "two").write_text("2")
    assert sorted(done[:2]) == [str(part / "one"), str(part / "two")]
    assert done[2:] == [str(part), "renamed", str(tmp_path)]


def test_a_new_parent_folder_is_synced_too(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda file: (synced.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file))
    )
    with building(tmp_path / "new" / "file", silent) as part:
        part.write_text("1")
    assert synced == [str(tmp_path), str(part), str(tmp_path / "new")]


def test_json_has_null_for_what_it_lacks():
    value = {"a": float("nan"), "b": [1.5, (float("inf"), -float("inf"))], "c": {"d": "NaN"}}
    expected = {"a": None, "b": [1.5, [None, None]], "c": {"d": "NaN"}}
    assert json.loads(to_json(value, indent=2)) == finite(value) == expected
    assert to_json({"ä": 0.1}, ensure_ascii=False) == '{"ä": 0.1}'


DEAD = 2**22 + 1  # above the largest number of a process


def write(folder: Path, kind: str = "model", **contents: str) -> None:
    with new_folder(folder, kind) as partial:
        for name, content in contents.items():
            (partial / name).write_text(content)


def refuse(folder: Path, kind: str = "model") -> str:
    with pytest.raises(CheckpointError) as error:
        check_replaceable(folder, kind, lambda folder: False)
    return str(error.value)


def test_a_link_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "file").write_text("old")
    (tmp_path / "file").symlink_to("disk/file")
    replace_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").is_symlink()
    assert (tmp_path / "disk" / "file").read_text() == "new"
    write(tmp_path / "disk" / "model", a="old")
    (tmp_path / "model").symlink_to("disk/model")
    write(tmp_path / "model", a="new")
    assert (tmp_path / "model").is_symlink()
    assert (tmp_path / "disk" / "model" / "a").read_text() == "new"
    assert names(tmp_path / "disk") == ["file", "model"]


def test_of_a_linked_folder_the_link_alone_is_deleted(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    remove_folder(tmp_path / "link")
    assert names(tmp_path) == ["elsewhere"]


def test_a_pipe_is_written_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    replace_file(tmp_path / "pipe", b"results")
    assert os.read(reader, 100) == b"results"
    os.close(reader)
    assert names(tmp_path) == ["pipe"]


@pytest.mark.parametrize("number", [None, errno.EINVAL, errno.ENOSYS])
def test_a_folder_is_exchanged_or_renamed(tmp_path, monkeypatch, number):
    """Where the system cannot exchange two names, the old folder is renamed first."""
    if number is not None:

        def fail(one, other):
            raise OSError(number, "no")

        monkeypatch.setattr(files, "_swap", fail)
    write(tmp_path / "model", a="old")
    write(tmp_path / "model", b="new")
    assert names(tmp_path / "model") == [MANIFEST, "b"]
    assert names(tmp_path) == ["model"]


def test_a_process_in_the_folder_stays_in_it(tmp_path, monkeypatch):
    write(tmp_path / "model", a="old")
    monkeypatch.chdir(tmp_path / "model")
    write(Path(), a="new")
    assert Path("a").read_text() == "new"


def test_what_dead_processes_left_is_deleted_or_put_back(tmp_path):
    living = f".model.partial-{os.getppid()}"
    for name in (f".model.partial-{DEAD}", f".model.old-{DEAD}", living, ".model.partial-mine"):
        (tmp_path / name).mkdir()
    (tmp_path / f".model.old-{DEAD}" / "a").write_text("old")
    files.sweep(tmp_path / "model")
    assert names(tmp_path) == [living, ".model.partial-mine", "model"]
    assert (tmp_path / "model" / "a").read_text() == "old"
    (tmp_path / f".model.old-{DEAD}").mkdir()
    write(tmp_path / "model", a="new")
    assert names(tmp_path) == [living, ".model.partial-mine", "model"]
    assert (tmp_path / "model" / "a").read_text() == "new"


def test_only_a_folder_as_it_was_written_is_replaced(tmp_path):
    folder = tmp_path / "model"
    check_replaceable(folder, "model", lambda folder: False)
    write(folder, a="1", b="2")
    check_replaceable(folder, "model", lambda folder: False)
    assert "not written as part of the export" in refuse(folder, "export")
    (folder / "b").unlink()
    check_replaceable(folder, "model", lambda folder: False)
    (folder / "a").write_text("0")
    assert "'a' has been changed since" in refuse(folder)
    (folder / "a").write_text("1")
    (folder / "notes").mkdir()
    assert "'notes', which switchlm has not written" in refuse(folder)
    (folder / "notes").rmdir()
    (folder / "a").rename(tmp_path / "a")
    (folder / "a").symlink_to("../a")
    assert "'a' has been changed" in refuse(folder)
    (folder / MANIFEST).write_text("[" * 100_000)
    assert "'a', which switchlm has not" in refuse(folder)
    (tmp_path / "file").write_text("")
    assert "is a file" in refuse(tmp_path / "file")
    (folder / MANIFEST).unlink()
    check_replaceable(folder, "model", lambda folder: True)


def test_a_folder_is_changed_as_a_whole(tmp_path):
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "a").write_text("a")
    (folder / "b").write_text("b")

    def change(fail: bool) -> None:
        with changed_folder(folder) as copy:
            replace_file(copy / "b", b"new")
            (copy / "inner" / "a").unlink()
            if fail:
                raise RuntimeError

    with pytest.raises(RuntimeError):
        change(fail=True)
    assert (folder / "b").read_text() == "b"
    assert (folder / "inner" / "a").read_text() == "a"
    change(fail=False)
    assert (folder / "b").read_text() == "new"
    assert names(folder / "inner") == []
    assert names(tmp_path) == ["folder"]
