"""The pause of training for a checkpoint, compared with a step.

    python benchmarks/checkpoint.py [--experts 16 --rows 8 --inputs 256] [--repeats 3]

Preset `small` (d_model 512, 6 + 6 layers), float32; with all its 64 experts and AdamW, weights,
gradients, optimizer state and the copies take 28 bytes per parameter, 24 GB, and half of that with
32 experts. Every repeat takes steps, saves, and takes steps until the checkpoint is on the disk.
The pause is the call of `save`; `prepare` has allocated the memory of its copies before.
"""

import argparse
import dataclasses
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import harness
from switchlm.checkpoint.store import CheckpointStore
from switchlm.data.batch import Batch
from switchlm.model import count
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer
from switchlm.training.config import TrainingConfig
from switchlm.training.optimizer import build_optimizer, optimizer_state
from switchlm.training.step import training_step


def build(options: argparse.Namespace) -> tuple[Callable[[], None], Callable[[], dict[str, Any]]]:
    """Return a training step, and a function that returns the state to save."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    config = dataclasses.replace(preset("small"), num_experts=options.experts)
    model = SwitchTransformer(config).to(device).train()
    training = TrainingConfig(optimizer=options.optimizer)
    optimizer = build_optimizer(model, training)
    inputs_BS = torch.randint(3, config.vocabulary_size, (options.rows, options.inputs))
    targets_BT = torch.randint(3, config.vocabulary_size, (options.rows, options.inputs // 4))
    batch = Batch(
        inputs_BS=inputs_BS,
        targets_BT=targets_BT,
        input_segments_BS=None,
        target_segments_BT=None,
        source_B=torch.zeros(options.rows, dtype=torch.int32),
    ).to(device)

    def step() -> None:
        training_step(model, optimizer, [batch], gradient_clip=training.gradient_clip)
        if device.type != "cpu":
            torch.accelerator.synchronize()

    def state() -> dict[str, Any]:
        return {"model": model.state_dict(), "optimizer": optimizer_state(model, optimizer)}

    return step, state


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(
    store: CheckpointStore,
    step: Callable[[], None],
    state: Callable[[], dict[str, Any]],
    number: int,
) -> dict[str, Any]:
    """Return the seconds of steps, of the pause, of steps while saving, and of the save."""
    quiet = [seconds_of(step) for _ in range(2)]
    started = time.perf_counter()
    pause = seconds_of(lambda: store.save(number, state()))
    busy = []
    pending = store._pending
    assert pending is not None
    while not pending.done():
        busy.append(seconds_of(step))
    store.wait()
    return {
        "step": quiet,
        "pause": pause,
        "step_while_writing": busy,
        # Rounded up to whole steps.
        "until_safe": time.perf_counter() - started,
    }


def _middle(seconds: list[float]) -> float:
    return statistics.median(seconds)


def _spread(seconds: list[float]) -> list[str]:
    return [f"{_middle(seconds):.2f}", f"{min(seconds):.2f} to {max(seconds):.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--optimizer", choices=("adamw", "adafactor"), default="adamw")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--inputs", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", type=Path, help="where checkpoints go; default: a temporary one"
    )
    parser.add_argument("--name", default="checkpoint", help="of the files in results/")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    bandwidth = harness.copy_bandwidth()
    step, state = build(options)
    step()
    folder = Path(tempfile.mkdtemp(prefix="checkpoints-", dir=options.folder))
    try:
        with CheckpointStore(folder, keep=1) as store:
            store.prepare(state())
            store.wait()
            runs = []
            for number in range(options.repeats):
                runs.append(measure(store, step, state, number))
                print(runs[-1], file=sys.stderr, flush=True)
            num_bytes = sum(p.stat().st_size for p in folder.glob("step-*/*"))
    finally:
        shutil.rmtree(folder)
    steps = [s for run in runs for s in run["step"]]
    busy = [s for run in runs for s in run["step_while_writing"]]
    pauses = [run["pause"] for run in runs]
    median = statistics.median(steps)
    shares = [pause / median for pause in pauses]
    config = dataclasses.replace(preset("small"), num_experts=options.experts)
    record = {
        "environment": harness.environment(options.seed),
        "repeats": options.repeats,
        "clock": "wall",
        "experts": options.experts,
        "optimizer": options.optimizer,
        "rows": options.rows,
        "inputs": options.inputs,
        "parameters": count.parameters(config),
        "bytes": num_bytes,
        "copy_bandwidth": bandwidth,
        "runs": runs,
        "pause_share_of_a_step": shares,
    }
    wait = [run["until_safe"] for run in runs]
    share = f"{statistics.median(shares):.1%} (worst {max(shares):.1%})"
    rows = [
        ["a step, nothing else going on", *_spread(steps), "100%"],
        ["a step while a checkpoint is written", *_spread(busy), f"{_middle(busy) / median:.0%}"],
        ["the pause of a save", *_spread(pauses), share],
        ["until it is safe, in whole steps", *_spread(wait), ""],
    ]
    headers = [
        f"small, E {options.experts}, {record['parameters'] / 1e6:.0f}M parameters, "
        f"{options.optimizer}, {num_bytes / 1e9:.1f} GB, {options.rows} x {options.inputs}",
        "median s",
        "from, to",
        "of a step",
    ]
    harness.write(options.name, "What a checkpoint costs", record, [harness.table(headers, rows)])


if __name__ == "__main__":
    main()
