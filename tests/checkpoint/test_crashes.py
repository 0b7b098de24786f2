"""Processes stopped, killed and interrupted in the middle of saves, and the power lost.

The work is done by crash_driver.py in a process of its own.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests import commands

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks processes")

Drive = Callable[..., dict[str, Any]]


@pytest.fixture
def drive(tmp_path: Path) -> Drive:
    def run(command: str, *arguments: object, driver: str = "crash_driver.py") -> dict[str, Any]:
        driver = str(Path(__file__).with_name(driver))
        words = [sys.executable, driver, command, str(tmp_path), *map(str, arguments)]
        done = commands.run(words, seconds=600)
        assert done.returncode == 0, done.stderr
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result

    return run


def test_a_stop_after_any_step_of_a_save_leaves_the_old_or_the_new_state(drive: Drive) -> None:
    result = drive("enumerate")
    assert result["failures"] == []
    assert result["stops"] > 120
    assert result["old"] > 90
    assert result["new"] >= 20


def test_a_stop_after_any_step_of_any_write_leaves_the_old_or_the_new_files(drive: Drive) -> None:
    """Of everything that commands write."""
    result = drive("all", driver="write_driver.py")
    assert result["failures"] == []
    for name, counts in result["found"].items():
        assert counts.get("old"), name
        assert counts.get("new"), name


def check_kills(result: dict[str, Any], num_kills: int) -> None:
    assert result["kills"] == num_kills
    assert result["inside_save"] >= num_kills // 3
    assert result["differences"] == []


def test_a_run_killed_at_random_moments_ends_bitwise_as_one_undisturbed(drive: Drive) -> None:
    check_kills(drive("kills", 20), 20)


@pytest.mark.slow
def test_a_hundred_kills(drive: Drive) -> None:
    check_kills(drive("kills", 100), 100)


def test_an_interrupt_while_waiting_does_not_cut_the_save_short(drive: Drive) -> None:
    assert drive("interrupt") == {"status": 130, "whole": True}
