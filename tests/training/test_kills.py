"""T1: SIGKILL at random moments, then resume; the run ends as if nothing had happened."""

import json
import os
import sys
from pathlib import Path

import pytest
from tests.commands import run

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the driver forks")


def drive(folder: Path, num_kills: int) -> dict:
    command = [sys.executable, str(Path(__file__).with_name("kill_driver.py"))]
    done = run([*command, str(folder), str(num_kills)], seconds=1200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_killed_run_ends_bitwise_as_the_undisturbed_one(tmp_path):
    result = drive(tmp_path, 3)
    assert result["resumed"], "a killed run could not go on"
    assert result["curves"]
    assert result["states"]
    assert result["kills"] >= 2


@pytest.mark.slow
def test_a_hundred_kills(tmp_path):
    result = drive(tmp_path, 100)
    assert result == {
        "kills": 100, "resumed": True, "curves": True, "states": True, "lines": result["lines"],
    }  # fmt: skip
