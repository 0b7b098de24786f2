"""The recorder against collectives whose sizes are known, on four real processes."""

import os
import sys
from pathlib import Path

from tests.commands import run


def test_every_collective_is_written_down_once_with_its_axes_and_its_size(tmp_path: Path) -> None:
    worker = Path(__file__).parent / "ledger_worker.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    done = run(
        [*command, str(worker), str(tmp_path / "lines")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "lines").read_text().splitlines() == [
        "all_reduce dataxexpert 4 12 18.0",
        "all_to_all expert 2 16 8.0",
        "all_to_all expert 2 48 24.0",
        "all_to_all expert 2 48 24.0",  # the gradient travels back
        "all_gather expert 2 40 20.0",
        "all_gather data 2 128 64.0",
        "reduce_scatter data 2 128 64.0",
    ]
