import errno
import fcntl
import json
import os

import pytest

from switchlm.errors import DataError
from switchlm.files import building, finite, to_json


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
    (tmp_path / "file.part-dead").mkdir()
    (tmp_path / "other.part-dead").mkdir()
    with building(tmp_path / "file", silent):
        pass
    assert names(tmp_path) == ["other.part-dead"]


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
