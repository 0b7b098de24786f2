"""Kills a training run at random moments and resumes it: test_kills.py runs it.

A program of its own, because it forks: with torch imported once, a hundred processes live and die
in a minute. Prints one JSON object.

    kill_driver.py FOLDER NUM_KILLS
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from switchlm.checkpoint.store import CheckpointStore
from switchlm.data.config import DataConfig
from switchlm.data.pretraining.loader import open_data
from switchlm.model.config import ModelConfig, RouterConfig
from switchlm.model.transformer import SwitchTransformer
from switchlm.training.config import TrainingConfig
from switchlm.training.loop import train
from switchlm.training.monitor import read_metrics
from switchlm.training.run_folder import RunFolder

CLOCK = {"seconds", "tokens_per_second"}


def write_text(folder: Path) -> None:
    words = random.Random(0)
    for source in ("red", "blue"):
        (folder / source).mkdir(parents=True)
        for document in range(20):
            text = " ".join(f"{source}{words.randrange(30)}" for _ in range(60))
            (folder / source / f"{document}.txt").write_text(text, encoding="utf-8")


def work(run: RunFolder, text: Path, steps: int) -> None:
    """One life of the run: from its newest checkpoint to the end, several epochs of the text."""
    data = DataConfig(
        sources=(str(text / "red"), str(text / "blue")),
        mixing="temperature",
        input_length=48,
        batch_size=4,
        held_out_share=0.2,
    )
    loader = open_data(data, seed=0, cache_dir=text / "cache")
    model = ModelConfig(
        vocabulary_size=loader.tokenizer.vocabulary_size,
        d_model=16,
        d_ff=16,
        d_kv=8,
        num_heads=2,
        num_encoder_layers=2,
        num_decoder_layers=2,
        num_experts=4,
        dropout=0.1,
        router=RouterConfig(balance="bias"),
    )
    config = TrainingConfig(
        steps=steps, log_every=2, evaluate_every=25, evaluate_batches=1, checkpoint_every=5
    )
    torch.manual_seed(0)
    for _ in train(SwitchTransformer(model), loader, config, run=run, resume=True):
        pass


def start(run: RunFolder, text: Path, steps: int) -> int:
    """Fork a life of the run and return its process number; the child never returns."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        work(run, text, steps)
        status = 0
    finally:
        os._exit(status)


def wait_for_a_save(run: RunFolder, limit: float) -> None:
    """Return in the middle of a save, or after `limit` seconds."""
    end = time.monotonic() + limit
    while time.monotonic() < end and not list(run.checkpoints.glob(".step-*.partial-*")):
        time.sleep(0.0005)


def wait_for_lines(run: RunFolder, lines: int, pid: int) -> None:
    """Return once the run has written a number of further lines of metrics, or has ended."""

    def written() -> int:
        return run.metrics.read_bytes().count(b"\n") if run.metrics.exists() else 0

    first = written()
    while written() < first + lines and not os.waitid(
        os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT
    ):
        first = min(first, written())  # a resumed run cuts what it will write again
        time.sleep(0.0005)


def kill_and_resume(folder: Path, num_kills: int) -> dict[str, Any]:
    """Run once undisturbed, once with kills, a third of them inside a save; compare the two."""
    text = folder / "text"
    write_text(text)
    steps = 20 + 8 * num_kills
    whole, killed = RunFolder(folder / "whole"), RunFolder(folder / "killed")
    started = time.monotonic()
    undisturbed = start(whole, text, steps)  # in a process too, so that this one has no threads
    if os.waitpid(undisturbed, 0)[1]:
        return {"kills": 0, "resumed": False}
    a_step = (time.monotonic() - started) / steps
    moments = random.Random(1)
    kills = 0
    while True:
        pid = start(killed, text, steps)
        if kills < num_kills:
            wait_for_lines(killed, moments.randrange(5), pid)
            time.sleep(moments.uniform(0, 2 * a_step))
            if kills % 3 == 0:
                wait_for_a_save(killed, limit=1.0)
                time.sleep(moments.uniform(0, 0.01))
            os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status == -signal.SIGKILL:
            kills += 1
        elif status == 0:
            break
        else:
            return {"kills": kills, "resumed": False}
    return {"kills": kills, "resumed": True, **compare(whole, killed)}


def compare(one: RunFolder, other: RunFolder) -> dict[str, Any]:
    """Return whether the curves and everything in the last checkpoint are bitwise equal."""
    curves = [
        [{key: line[key] for key in line.keys() - CLOCK} for line in read_metrics(run.metrics)]
        for run in (one, other)
    ]
    states = [CheckpointStore(run.checkpoints).load() for run in (one, other)]
    for state in states:
        state["progress"]["done"].pop("seconds")
        state["progress"]["logged"].pop("seconds")
    return {"curves": curves[0] == curves[1], "states": equal(*states), "lines": len(curves[0])}


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return bool(one == other)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(kill_and_resume(Path(sys.argv[1]), int(sys.argv[2]))))
