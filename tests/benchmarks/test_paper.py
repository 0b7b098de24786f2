"""benchmarks/paper: shared runs, resuming, failures, and real small runs of every kind."""

import json
import math
import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from benchmarks.paper import __main__ as command
from benchmarks.paper import plans, schedule
from benchmarks.paper import runs as runs_module
from benchmarks.paper.base import DENSE, dense, switch
from benchmarks.paper.plans import Distillation, Finetuning, Pretraining
from benchmarks.paper.runs import DivergedError, Place, Run, with_needs, work
from benchmarks.paper.schedule import run_all
from benchmarks.paper.table import Result
from tests import commands

from switchlm.config import read_yaml
from switchlm.model import count

ROOT = Path(__file__).resolve().parents[2]
TABLES = [command.load(name) for name in command.TABLES]
LONG_ENOUGH = "finetune.target_length=16"  # for labels in bytes


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path / "data", tmp_path / "out")


@dataclass(frozen=True)
class Toy:
    """A plan that returns or raises at once, as given."""

    name: str
    behave: Callable[[], dict] = lambda: {"evaluations": [{"evaluation_loss": 1.0}]}
    needs: tuple["Toy", ...] = ()

    def configuration(self, seed, place):
        return {"name": self.name, "seed": seed}

    def seconds(self, place):
        return 1.0

    def perform(self, run, out, stop):
        return self.behave()


def raising(error):
    def behave():
        raise error

    return behave


def test_tables_share_runs_of_equal_configuration(place):
    tables = [command.load(name, [0]) for name in command.TABLES]
    by_name = {table.name: dict(table.runs(place)) for table in tables}
    assert by_name["table1"]["dense"].key == by_name["figure1"]["dense"].key
    assert by_name["figure5"]["Switch"].key == by_name["table6"]["Switch (teacher)"].key
    assert by_name["table7"]["8 experts"].key == by_name["figure1"]["8 experts"].key
    # Exploration is argmax anyway: resolved, these are one run.
    assert by_name["table11"]["argmax"].key == by_name["figure1"]["64 experts"].key
    every = [run for table in TABLES for _, run in table.runs(place)]
    assert len(list(with_needs(every))) < 0.9 * len(every)


def test_whatever_decides_a_run_is_in_its_key(place):
    student = Distillation(teacher=switch(4), student=DENSE, settings={"hard_weight": 1.0})
    kinds = [
        Run(DENSE, 0, place),
        Run(DENSE, 1, place),
        Run(dense(steps=7), 0, place),
        Run(switch(4), 0, place),
        Run(switch(4, rate=0.5), 0, place),
        Run(student, 0, place),
        Run(Distillation(teacher=switch(8), student=DENSE, settings=student.settings), 0, place),
        Run(Finetuning(model=DENSE, task="sst2"), 0, place),
        Run(Finetuning(model=switch(4), task="sst2"), 0, place),
        Run(DENSE, 0, Place(place.data, place.out, most_steps=5)),
    ]
    assert len({run.key for run in kinds}) == len(kinds)
    elsewhere = Place(Path("/elsewhere"), place.out)
    assert Run(DENSE, 0, elsewhere).key == Run(DENSE, 0, place).key


def test_dense_twins_take_equal_flops_and_wider_ones_three_and_a_half_times(place):
    figure1, figure5 = (
        dict(command.load(name, [0]).runs(place)) for name in ("figure1", "figure5")
    )

    def flops(run):
        return count.flops_per_token(run.plan.resolve(0, place).model, 64, 14)

    for name, run in figure1.items():
        assert 1 <= flops(run) / flops(figure1["dense"]) < 1.2, name
    assert flops(figure5["wider dense"]) / flops(figure1["dense"]) == pytest.approx(3.5, rel=0.05)


def test_rates_are_those_of_the_demo(place):
    from switchlm.recipes.compare import configure

    pair = configure()
    assert DENSE.resolve(0, place).training.learning_rate == pair.dense.training.learning_rate
    halved = switch(64, rate=0.5).resolve(0, place).training.learning_rate
    assert halved == pytest.approx(pair.sparse.training.learning_rate / 2)


@pytest.fixture
def at_once(monkeypatch):
    """Runs are done in this process, as soon as they are started."""

    class Process:
        exitcode = 0

        def __init__(self, target, args, daemon):
            self.start = lambda: target(args[0], os.getppid())

        def is_alive(self):
            return False

    context = SimpleNamespace(Process=Process)
    monkeypatch.setattr(schedule.multiprocessing, "get_context", lambda kind: context)
    monkeypatch.setattr(schedule.signal, "signal", lambda *_: None)
    monkeypatch.setattr(schedule.time, "sleep", lambda _: None)


def do(kinds, place):
    place.out.mkdir(parents=True, exist_ok=True)
    said: list[str] = []
    todo = list(with_needs([Run(plan, 0, place) for plan in kinds]))
    run_all(todo, {run.key: run.plan.name for run in todo}, 2, said.append)
    return said


def test_what_is_finished_is_not_done_again(at_once, place):
    calls: list[str] = []

    def count_calls():
        calls.append("")
        return Toy("").behave()

    kinds = [Toy("a", count_calls), Toy("b", count_calls)]
    assert do(kinds, place)[0].startswith("2 of 2 runs to do.")
    Run(kinds[0], 0, place).file.unlink()
    assert do(kinds, place)[0].startswith("1 of 2 runs to do.")
    assert len(calls) == 3


def test_a_run_that_fails_is_recorded_tried_again_and_stops_no_other(at_once, place):
    bad = Toy("bad", raising(ValueError("no such text")))
    after = Toy("after", needs=(bad,))
    good = Toy("good")
    for _ in range(2):
        said = do([bad, after, good], place)
        assert any("bad: failed: ValueError: no such text" in line for line in said)
        assert Run(good, 0, place).finished
        assert not Run(bad, 0, place).finished
        assert Run(after, 0, place).record() is None
    assert said[0].startswith("2 of 3 runs to do.")


def test_a_run_without_its_parent_records_nothing(monkeypatch, place):
    monkeypatch.setattr(runs_module.signal, "signal", lambda *_: None)
    place.out.mkdir()
    run = Run(Toy("left alone"), 0, place)
    work(run, parent=-1)
    assert run.record() is None


def losses_of_a_line():
    return json.loads(json.dumps({"evaluation_loss": math.nan}, allow_nan=False))


@pytest.mark.parametrize(
    "behave",
    [raising(DivergedError("no finite gradient")), losses_of_a_line],
    ids=["steps", "loss"],
)
def test_a_run_that_diverges_is_a_result_also_for_what_starts_from_it(at_once, place, behave):
    bad = Toy("bad", behave)
    after = Toy("after", needs=(bad,))
    do([after], place)
    for plan in (bad, after):
        assert Run(plan, 0, place).finished
        assert Result(Run(plan, 0, place).record()).quality == -math.inf


def books(folder):
    draw = random.Random(0)
    folder.mkdir(parents=True)
    words = ["the", "a", "ship", "sea", "storm", "king", "queen", "sailed", "wept", "old"]
    for book in range(10):
        lines = (" ".join(draw.choices(words, k=12)) for _ in range(80))
        (folder / f"{book}.txt").write_text("\n".join(lines))


def test_every_kind_of_run_ends_in_its_figures(monkeypatch, tmp_path):
    monkeypatch.setattr(plans, "EVALUATE_BATCHES", 1)
    monkeypatch.setattr(runs_module.signal, "signal", lambda *_: None)
    monkeypatch.setenv("HOME", str(tmp_path))
    place = Place(tmp_path / "data", tmp_path / "out", most_steps=4)
    place.out.mkdir()
    books(place.data / "books")
    draw = random.Random(0)
    (place.data / "sst2").mkdir()
    for split, examples in (("train", 60), ("dev", 20), ("test", 20)):
        lines = [f"some words {draw.random()}\t{draw.randrange(2)}" for _ in range(examples)]
        text = "\n".join(["sentence\tlabel", *lines])
        (place.data / "sst2" / f"{split}.tsv").write_text(text)
    text = 'data.sources=["{data}/books"]'
    own = (text, "data.held_out_share=0.2", "data.batch_size=8")
    twin = Pretraining(steps=9, dense=True, overrides=own)
    sparse = Pretraining(steps=9, overrides=("model.num_experts=4", *own))
    kinds = [
        twin,
        sparse,
        Distillation(teacher=sparse, student=twin, settings={"hard_weight": 0.75}),
        Finetuning(model=sparse, task="sst2", overrides=("model={dropout: 0.1}", LONG_ENOUGH)),
    ]
    found = []
    for plan in kinds:
        run = Run(plan, 3, place)
        work(run, os.getppid())
        assert "figures" in run.record(), run.record()
        found.append(run.record()["figures"])
    dense_, sparse_, student, tuned = found
    assert dense_["step"] == sparse_["step"] == student["step"] == 4
    assert dense_["tokens"] == sparse_["tokens"]
    assert student["parameters"] == dense_["parameters"] < sparse_["parameters"]
    assert student["learning_rate"] == dense_["learning_rate"]
    assert tuned["metric"] == "accuracy"
    assert tuned["examples"] == 20
    assert 0 <= Result(Run(kinds[3], 3, place).record()).score <= 100
    stored = read_yaml(Run(kinds[3], 3, place).folder / "config.yaml")
    assert stored["model"]["dropout"] == 0.1


def test_a_table_from_the_command_line(tmp_path, monkeypatch, capsys):
    environment = {**os.environ, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    out = tmp_path / "out"
    ask = [sys.executable, "-m", "benchmarks.paper", "table3", "--steps", "4"]
    ask += ["--seeds", "0", "--out", str(out)]
    before = (ROOT / "docs" / "results.md").read_bytes()
    done = commands.run(ask, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 runs to do." in done.stdout
    assert "failed" not in done.stdout
    text = (out / "results.md").read_text()
    assert "| s = 1.0 | " in text
    assert "not measured: 1 of 3 seeds" in text
    assert "| reproduced |" not in text
    next(out.glob("*.json")).unlink()
    monkeypatch.setattr(sys, "argv", [*ask[2:], "--only-write"])
    command.main()
    again = capsys.readouterr().out
    assert "Not measured: " in again
    assert "runs to do" not in again
    assert (ROOT / "docs" / "results.md").read_bytes() == before


def test_a_table_that_is_not_there_is_named():
    done = commands.run([sys.executable, "-m", "benchmarks.paper", "table12"], cwd=ROOT)
    assert done.returncode == 2
    assert "There is no table12" in done.stderr
