import errno
import fcntl

import pytest

from switchlm.errors import DataError
from switchlm.files import building


def names(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def silent(line):
    pass


def test_what_is_written_appears_whole(tmp_path):
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


def test_leftovers_of_the_dead_are_removed(tmp_path):
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


def test_without_locks_whoever_renames_first_wins(tmp_path, monkeypatch):
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


def test_who_waits_is_told_so(tmp_path, monkeypatch):
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
