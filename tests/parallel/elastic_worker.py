"""A toy training under torchrun: test_elastic.py kills and stops it.

    torchrun ... elastic_worker.py FOLDER STEPS SECONDS_A_STEP TIMEOUT

Every rank adds its own random gradient to the sum of all; rank 0 saves every fifth step.
"""

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from switchlm.checkpoint.store import CheckpointStore
from switchlm.errors import SwitchLMError
from switchlm.parallel.launch import launched, process_group


def work(folder: Path, steps: int, step_seconds: float, timeout: float) -> None:
    launch = launched()
    assert launch is not None
    with process_group(launch, timeout) as watch:
        weight = torch.zeros(8)
        store = CheckpointStore(folder / "checkpoints")
        done = 0
        if store.steps():
            done = int(store.load(into={"weight": weight})["progress"])
        print(f"rank {launch.rank} pid {os.getpid()} from {done} try {launch.restarts}", flush=True)
        dist.barrier()
        for step in range(done, steps):
            generator = torch.Generator().manual_seed(1000 * step + launch.rank)
            gradient = torch.randn(8, generator=generator)
            dist.all_reduce(gradient)
            weight += gradient
            time.sleep(step_seconds)
            watch.note(step + 1)
            if (step + 1) % 5 == 0 and launch.rank == 0:
                store.save(step + 1, {"weight": weight, "progress": step + 1})
                print(f"saved {step + 1}", flush=True)
        store.wait()
        if launch.rank == 0:
            (folder / "weight.txt").write_text(repr(weight.tolist()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        work(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]))
    except SwitchLMError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
