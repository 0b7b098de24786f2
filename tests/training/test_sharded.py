"""Updates of sharded tensors (DTensor) equal those of full tensors."""

import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from tests.commands import run


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")
def test_sharded_updates_equal_whole_ones(tmp_path):
    """Two processes; rows, columns, experts and vectors sharded; one step of four skipped."""
    command = [sys.executable, str(Path(__file__).with_name("sharded_driver.py")), str(tmp_path)]
    done = run(command)
    assert done.returncode == 0, done.stderr[-3000:]
