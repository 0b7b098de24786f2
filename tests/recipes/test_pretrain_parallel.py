"""`switchlm pretrain` in several processes, and once under torchrun: the run of one process."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import commands
from tests.parallel.processes import run_switchlm

from switchlm.huggingface.load import load

SETTINGS = {
    "training.log_every": 4,
    "training.evaluate_every": 8,
    "training.evaluate_batches": 2,
    "training.checkpoint_every": 4,
    "training.accumulate": 2,
    "data.batch_size": 4,
    "data.input_length": 32,
    "data.held_out_share": 0.1,
    "data.pack": "true",
    "router.group_rows": 1,
    "router.exploration": "argmax",
}


# Of a line of evaluation: what a single process alone measures.
INSIDE = {
    "attention_near", "layers", "gate", "dead_experts", "router_entropy", "load_entropy",
    "kept_expert",
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with text, and a place for the token cache."""
    folder = tmp_path_factory.mktemp("home")
    for number in range(20):
        words = " ".join(f"{number} and {other} are {number * other};" for other in range(60))
        (folder / f"{number}.txt").write_text(words, encoding="utf-8")
    return folder


def command(home: Path, out: str, *arguments: str, mesh: str = "", steps: int = 12) -> list[str]:
    settings = {**SETTINGS, "training.steps": steps}
    return [
        *("pretrain", "--preset", "nano", "--out", str(home / out)),
        *("--data", str(home / "*.txt")),
        *(f"--set={name}={value}" for name, value in settings.items()),
        *(f"--set=mesh.{axis}" for axis in mesh.split()),
        *arguments,
    ]


def run(home: Path, out: str, processes: int, *arguments: str, **options: Any) -> commands.Done:
    """Run `switchlm pretrain` in that number of processes."""
    return run_switchlm(processes, home, command(home, out, *arguments, **options))


def metrics(home: Path, out: str) -> list[dict]:
    lines = (home / out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def alone(home):
    done = run(home, "alone", 1)
    assert done.returncode == 0, done.stderr
    return metrics(home, "alone")


def assert_same_run(found: list[dict], expected: list[dict]) -> None:
    """Compare all that does not depend on the clock, nor is measured by a single process alone."""
    assert all(line.keys() >= INSIDE for line in expected if "evaluation_loss" in line)
    expected = [
        {name: line[name] for name in line.keys() - (INSIDE if "evaluation_loss" in line else ())}
        for line in expected
    ]
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("step", "tokens", "load", "layers", "skipped", "learning_rate"):
            assert ours.get(name) == theirs.get(name), name
        for name in ("loss", "balance_loss", "gradient_norm", "dropped", "evaluation_loss"):
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


def routing(home: Path, out: str) -> list[dict]:
    """Return routing.json, but for the tokens, which are those of the first process."""
    records = json.loads((home / out / "routing.json").read_text())
    for record in records:
        del record["top_tokens"], record["gate"]
    return records


def test_stopped_and_resumed_on_other_meshes_it_is_the_same_run(home, alone):
    """4 -> 2 -> 1 -> 4 processes in mid-epoch (T4)."""
    legs = [
        (4, 3, "data=2 expert=2"),
        (2, 6, "data=1 tensor=2 expert=1"),
        (1, 9, "data=1 tensor=1"),
        (4, 12, "expert=2 tensor=2"),
    ]
    for processes, steps, mesh in legs:
        resume = ["--resume"] if steps > 3 else []
        done = run(home, "legs", processes, *resume, mesh=mesh, steps=steps)
        assert done.returncode == 0, done.stderr[-3000:]
    # A leg logs and evaluates at its end as well, so that the next line is a shorter mean.
    found = {line["step"]: line for line in metrics(home, "legs") if "loss" in line}
    expected = {line["step"]: line for line in alone if "loss" in line}
    for step, line in expected.items():
        assert found[step]["tokens"] == line["tokens"]
        assert found[step]["load"] == line["load"]
    *_, last = (line for line in metrics(home, "legs") if "evaluation_loss" in line)
    assert last["evaluation_loss"] == pytest.approx(alone[-1]["evaluation_loss"], rel=1e-4)
    whole, parts = (load(home / out)[0].state_dict() for out in ("alone", "legs"))
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-4)
    assert routing(home, "legs") == routing(home, "alone")


def test_replicas_write_the_same_metrics(home, alone):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = commands.run(
        [
            *(sys.executable, *torchrun, "-m", "switchlm"),
            *command(home, "copies", mesh="replicas=2"),
        ],
        cwd=home,
        env={**os.environ, "HOME": str(home), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(metrics(home, "copies"), alone)
    assert done.stdout.count("Model: ") == 1, "only the first process speaks"
    assert routing(home, "copies") == routing(home, "alone")


def test_a_mesh_that_does_not_fit_is_one_sentence(home):
    done = run(home, "none", 2, mesh="expert=4")
    assert done.returncode != 0
    assert "mesh.replicas 1 x data any x expert 4 x tensor 1 cannot be 2 processes" in done.stderr
    assert not (home / "none").exists()


def test_rows_that_cannot_be_shared_out_are_one_sentence(home):
    done = run(home, "none", 4, "--set=data.batch_size=6", mesh="data=4")
    assert done.returncode != 0
    assert "A batch of 6 rows (data.batch_size;" in done.stderr
    assert "cannot be divided evenly over 4 workers" in done.stderr
    assert not (home / "none").exists()
