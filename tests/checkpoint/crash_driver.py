"""Stops processes in the middle of saves, and says what was left: test_crashes.py runs it.

A program of its own, because it forks: with torch imported once, a hundred processes live and die
in seconds. Prints one JSON object.

    crash_driver.py enumerate FOLDER    stop after every single step of the file system
    crash_driver.py kills FOLDER NUM    SIGKILL a training run NUM times and resume it
    crash_driver.py interrupt FOLDER    SIGINT while waiting for a save
"""

import gc
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fallible_disk import Disk
from torch import nn

from switchlm.checkpoint.store import CheckpointStore
from switchlm.errors import SwitchLMError
from switchlm.training.run_folder import RunFolder, truncate_metrics


def in_child(work: Callable[[], None]) -> int:
    """Fork, run `work`, and return the process number; the child never returns."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except Exception:
        traceback.print_exc()
        os._exit(1)


def status_of(pid: int) -> int:
    """Wait for a child; its exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# --- stop after every step of a save ---------------------------------------------------------


def example(step: int) -> dict[str, Any]:
    torch.manual_seed(step)
    return {
        "model": {"w.x": torch.randn(3, 5), "b": torch.randn((), dtype=torch.bfloat16)},
        "progress": {"step": step, "note": "old" if step < 20 else "new"},
    }


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def enumerate_stops(folder: Path) -> dict[str, Any]:
    """Every scenario, every mode, every step: what a reader finds, and whether saving goes on."""
    scenarios: dict[str, tuple[list[int], int, int]] = {
        "first": ([], 10, 20),
        "second, the first goes": ([10], 20, 20),
        "the same step again": ([20], 20, 21),
    }
    result: dict[str, Any] = {"stops": 0, "old": 0, "new": 0, "failures": []}
    for name, (before, step, content) in scenarios.items():
        stop_at, done = 0, False
        while not done:
            root, copies = folder / "run", folder / "copies"
            for path in (root, copies):
                shutil.rmtree(path, ignore_errors=True)
                path.mkdir(parents=True)
            for early in before:
                save_example(root, early, early)

            def work(root=root, copies=copies, stop_at=stop_at, step=step, content=content) -> None:
                disk = Disk(root, stop_at, copies)
                disk.install()
                save_example(root, step, content)
                disk.leave()

            status = status_of(in_child(work))
            done = status == 0
            for copy in sorted(copies.iterdir()):
                try:
                    assert status in (0, 9), f"the child ended with {status}"
                    found = judge(copy, before, step, content)
                    assert not done or found == "new", "saved, but the old state was found"
                    result[found] += 1
                except (AssertionError, SwitchLMError) as error:
                    result["failures"].append([name, copy.name, stop_at, repr(error)])
                result["stops"] += 1
            stop_at += 1
    return result


def save_example(root: Path, step: int, content: int) -> None:
    with CheckpointStore(root / "checkpoints", keep=1) as store:
        store.save(step, example(content), wait=True)


def judge(root: Path, before: list[int], step: int, content: int) -> str:
    """Return which state a reader finds, and check that the next save cleans up."""
    store = CheckpointStore(root / "checkpoints", keep=1)
    newest = store.newest()
    found = "old"
    if newest is None:
        assert not before, "neither the old nor the new state is there"
    else:
        assert not newest.damaged, newest.damaged
        state = store.load(newest.step)
        if newest.step == step and equal(state, example(content)):
            found = "new"
        else:
            assert equal(state, example(before[0])), "a state that never was"
    save_example(root, 30, 30)
    names = sorted(path.name for path in (root / "checkpoints").iterdir())
    assert names == ["step-00000030"], names
    assert equal(store.load(), example(30))
    return found


# --- kill a training run, resume it ----------------------------------------------------------

STEPS, EVERY = 48, 4


def train(root: Path) -> None:
    """A run of 48 steps with dropout and AdamW; resumes from what is in `root`."""
    run = RunFolder(root)
    run.create()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    start = 0
    with CheckpointStore(run.checkpoints, keep=2) as store:
        if store.newest() is not None:
            state = store.load()
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["random"])
            start = state["progress"]["step"]
        truncate_metrics(run.metrics, start)
        with run.metrics.open("a", encoding="utf-8") as metrics:
            for step in range(start + 1, STEPS + 1):
                generator = torch.Generator().manual_seed(step)
                x_ND = torch.randn(8, 6, generator=generator)
                loss = (model(x_ND) - x_ND[:, :2]).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                metrics.write(json.dumps({"step": step, "loss": loss.item()}) + "\n")
                metrics.flush()
                if step % EVERY == 0:
                    state = {
                        "model": model.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "random": torch.get_rng_state(),
                        "progress": {"step": step},
                    }
                    store.save(step, state)


def kill_and_resume(folder: Path, num_kills: int) -> dict[str, Any]:
    """Kill runs until there were `num_kills`; compare each finished run with one undisturbed."""
    calm = folder / "calm"
    train(folder / "first")  # imports what torch imports late, before any child needs it
    began = time.monotonic()
    assert status_of(in_child(lambda: train(calm))) == 0
    life = time.monotonic() - began
    expected = CheckpointStore(calm / "checkpoints").load()
    generator = random.Random(0)
    result: dict[str, Any] = {"kills": 0, "inside_save": 0, "runs": 0, "differences": []}
    while result["kills"] < num_kills:
        root = folder / f"run-{result['runs']}"
        for _ in range(10):
            if result["kills"] == num_kills:
                break
            inside = result["kills"] % 3 == 0
            killed = kill_once(root, generator, inside, life)
            result["kills"] += killed
            result["inside_save"] += killed and inside
        assert status_of(in_child(lambda root=root: train(root))) == 0
        store = CheckpointStore(root / "checkpoints")
        same = {
            "metrics": RunFolder(root).metrics.read_bytes() == RunFolder(calm).metrics.read_bytes(),
            "state": equal(store.load(), expected),
            # One killed after its last commit leaves an older checkpoint for the next save.
            "kept": store.steps()[-2:] == [STEPS - EVERY, STEPS],
        }
        if not all(same.values()):
            result["differences"].append([result["runs"], same])
        result["runs"] += 1
    return result


def kill_once(root: Path, generator: random.Random, inside: bool, life: float) -> bool:
    """Start or resume the run in `root` and kill it; false if it was done before."""
    stop_at = generator.randrange(75) if inside else -1

    def work() -> None:
        Disk(root / "checkpoints", stop_at).install()
        train(root)

    pid = in_child(work)
    if not inside:
        time.sleep(generator.uniform(0, life))
        os.kill(pid, signal.SIGKILL)
    status = status_of(pid)
    assert status in (0, -signal.SIGKILL), f"a resumed run ended with {status}"
    return status != 0


# --- a signal while waiting -----------------------------------------------------------------


def interrupt(folder: Path) -> dict[str, Any]:
    """SIGINT in `wait`; the interpreter exits as always, and must not cut the save short."""
    ready, signal_pipe = os.pipe()
    pid = os.fork()
    if pid == 0:
        fsync = os.fsync
        os.fsync = lambda descriptor: (time.sleep(0.05), fsync(descriptor))[1]
        store = CheckpointStore(folder / "checkpoints")
        store.save(10, example(10))
        os.write(signal_pipe, b"x")
        try:
            store.wait()
        except KeyboardInterrupt:
            sys.exit(130)
        os._exit(1)
    os.read(ready, 1)
    time.sleep(0.05)
    os.kill(pid, signal.SIGINT)
    status = status_of(pid)
    whole = equal(CheckpointStore(folder / "checkpoints").load(), example(10))
    return {"status": status, "whole": whole}


def main() -> None:
    torch.set_num_threads(1)
    gc.freeze()  # else every child copies the memory of the modules to collect garbage in it
    command, folder, *more = sys.argv[1:]
    root = Path(folder)
    os.fsync = lambda descriptor: None  # processes die here, not the machine; `Disk` does that part
    if command == "enumerate":
        result = enumerate_stops(root)
    elif command == "kills":
        result = kill_and_resume(root, int(more[0]))
    else:
        result = interrupt(root)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
