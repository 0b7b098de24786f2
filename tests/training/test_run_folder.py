"""The paths of a run, and truncation of its metrics to the step of a checkpoint."""

from pathlib import Path

import pytest

from switchlm.training.run_folder import RunFolder, truncate_metrics


def test_a_run_exists_once_something_of_it_is_there(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "a" / "run")
    assert not run.exists()
    run.create()
    assert run.root.is_dir()
    assert not run.exists()
    run.config.write_text("")
    assert run.exists()


@pytest.mark.parametrize(
    ("lines", "kept"),
    [
        (b"", b""),
        (b'{"step": 1}\n{"step": 2}\n', b'{"step": 1}\n{"step": 2}\n'),
        (b'{"step": 1}\n{"step": 2}\n{"step": 3}\n', b'{"step": 1}\n{"step": 2}\n'),
        (b'{"step": 1}\n{"step": 2', b'{"step": 1}\n'),
        (b'{"step": 1}\n{"step": 2}', b'{"step": 1}\n'),
        (b'{"run": 1}\n{"step": 3}\n{"step": 2}\n', b'{"run": 1}\n{"step": 2}\n'),
        (b'\x00\x00\x00\n[3]\n{"step": 2}\n', b'{"step": 2}\n'),
    ],
)
def test_metrics_go_back_to_a_step(tmp_path: Path, lines: bytes, kept: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines)
    truncate_metrics(path, 2)
    assert path.read_bytes() == kept
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_no_metrics_are_no_lines(tmp_path: Path) -> None:
    truncate_metrics(tmp_path / "metrics.jsonl", 5)
    assert list(tmp_path.iterdir()) == []
