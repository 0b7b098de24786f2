"""A toy training: test_elastic.py starts, kills, stops and cuts it off.

    torchrun ... elastic_worker.py FOLDER STEPS SECONDS_A_STEP TIMEOUT

Every rank adds its own random gradient to the sum of all, whole numbers, exact in any order; rank 0
saves every fifth step. Like `switchlm pretrain`, it goes on if it was restarted, and stops on
SIGTERM once its step is saved.
"""

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from switchlm.checkpoint.store import CheckpointStore
from switchlm.cli.progress import stop_on_signal
from switchlm.errors import SwitchLMError
from switchlm.parallel.launch import launched, process_group


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())  # at once, and whole: the lines of all ranks go to one file


def work(folder: Path, steps: int, step_seconds: float, timeout: float) -> None:
    launch = launched()
    assert launch is not None
    with stop_on_signal() as should_stop, process_group(launch, timeout) as heartbeat:
        weight = torch.zeros(8)
        store = CheckpointStore(folder / "checkpoints")
        done = 0
        if heartbeat.restarted and store.steps():
            done = int(store.load(into={"weight": weight})["progress"])
        say(f"rank {launch.rank} from {done} restarted {heartbeat.restarted}")
        dist.barrier()
        while done < steps:
            generator = torch.Generator().manual_seed(1000 * done + launch.rank)
            gradient = torch.randint(-999, 999, (9,), generator=generator).float()
            gradient[-1] = should_stop()
            dist.all_reduce(gradient)
            weight += gradient[:-1]
            time.sleep(step_seconds)
            done += 1
            heartbeat.beat(done)
            stop = bool(gradient[-1] > 0)
            if (done % 5 == 0 or stop) and launch.rank == 0:
                store.save(done, {"weight": weight, "progress": done}, wait=True)
                say(f"saved {done}")
            if stop:
                return
        if launch.rank == 0:
            (folder / "weight.txt").write_text(repr(weight.tolist()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        work(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]))
    except SwitchLMError as error:
        say(f"{type(error).__name__}: {error}")
        sys.exit(1)
