"""A sparse model of 64 experts against its dense twin, on a GPU and on the same text.

    python benchmarks/gpu_compare.py [--budget 120s] [--runs DIR]

`switchlm compare` with python:site-packages as bytes, d_model 512, 6 + 6 layers, in bfloat16 with
float32 routers; both models take turns on the GPU for equal steps. Writes results/gpu_compare.json
and .md: how much earlier, in steps and in time, the sparse model reaches the dense twin's final
loss.
"""

import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path

import torch

import harness

SETTINGS = (
    "data.input_length=256",
    "data.batch_size=128",
    "data.mean_span=6.0",
    "model.vocabulary_size=384",
    "model.num_experts=64",
    "training.precision=selective",
    # There are few byte tokens: frequent ones would exceed the capacity from the first step.
    "router.capacity_factor=null",
    "router.evaluation_capacity_factor=null",
    # With d_model 512, AdamW learns more slowly and more experts die: see docs/log.md.
    "training.optimizer=adafactor",
    "training.learning_rate=0.01",
    "training.evaluate_every=100",
    "training.log_every=50",
    "training.checkpoint_every=null",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", default="120s")
    parser.add_argument("--runs", default="runs/gpu-compare")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("On a GPU: the comparison was not measured.")
        return
    command = [sys.executable, "-m", "switchlm", "compare", "--json", "--overwrite"]
    command += ["--preset", "small", "--data", "python:site-packages"]
    command += ["--budget", options.budget, "--out", options.runs]
    for setting in SETTINGS:
        command += ["--set", setting]
    command += ["--set-dense", "training.learning_rate=0.01"]
    # A time limit ends the process group: the comparison stops, and this process writes
    # its results.
    signal.signal(signal.SIGTERM, lambda *_: None)
    done = subprocess.run(command, stdout=subprocess.DEVNULL)
    finished = Path(options.runs) / "compare.json"
    if not finished.exists():
        raise SystemExit(f"The comparison ended with status {done.returncode} before its end.")
    result = json.loads(finished.read_text())
    del result["example"]  # results are published, text is not
    record = {
        "environment": harness.environment(0),
        "repeats": 1,
        "clock": "wall",
        "compare": ["switchlm", *command[3:]],
        "result": result,
    }
    figures = {key: value for key, value in result.items() if isinstance(value, int | float | str)}
    rows = [[key, str(value)] for key, value in figures.items()]
    harness.write(
        "gpu_compare",
        "On a GPU: 64 experts against the dense twin on the same text",
        record,
        [harness.table(["figure", ""], rows)],
    )


if __name__ == "__main__":
    main()
