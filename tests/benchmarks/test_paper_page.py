"""benchmarks/paper: the words for claims, and the page from recorded results."""

import json
import math
import random
import sys

import pytest
from benchmarks.paper import __main__ as command
from benchmarks.paper.base import DENSE
from benchmarks.paper.page import page
from benchmarks.paper.runs import Place, Run, with_needs
from benchmarks.paper.table import Claim, Result, word


def load_all(seeds=None):
    return [command.load(name, seeds) for name in command.TABLES]


TABLES = load_all()


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path / "data", tmp_path / "out")


def made_up(run, *, name=""):
    """Return a record as a real run's, with figures out of the air."""
    draw = random.Random(run.key)
    steps = 100 * (1 + 5 * ("student" in str(run.configuration)))
    lines = [
        {
            "step": steps * part // 4,
            "seconds": float(part),
            "evaluation_loss": 2 - part / 4 + draw.gauss(0, 0.01),
            "evaluation_loss_by_source": {"a": 2 - part / 4 + draw.gauss(0, 0.01), "b": 1.0},
        }
        for part in (1, 2, 3, 4)
    ]
    figures = {
        "evaluations": lines, "step": steps, "tokens": 1000, "seconds": 4.0, "rows": 64,
        "dropped": 0.01, "learning_rate": 0.01, "parameters": 1000 + draw.randrange(9),
        "flops_per_token": 3e4, "metric": "accuracy", "one_answer": 50.0, "examples": 100,
        "scores": {"accuracy": {"value": draw.gauss(80, 2), "low": 78.0, "high": 82.0}},
    }  # fmt: skip
    environment = {
        "processor": "none", "device": "cpu", "threads": 1, "torch": "0", "commit": "0",
        "uncommitted_changes": False,
    }  # fmt: skip
    return {"seed": run.seed, "figures": figures, "environment": environment}


def record_all(place, seeds=None, tables=None):
    place.out.mkdir(parents=True, exist_ok=True)
    every = [run for table in tables or load_all(seeds) for _, run in table.runs(place)]
    for run in with_needs(every):
        run.file.write_text(json.dumps(made_up(run)))


@pytest.mark.parametrize(
    ("differences", "error", "expected"),
    [
        ([0.1, 0.12, 0.11], 0.0, "reproduced"),
        ([-0.1, -0.12, -0.11], 0.0, "not reproduced"),
        ([0.1, 0.12, -0.01], 0.0, "too small to tell"),
        ([0.1, 0.12, 0.04], 0.0, "too small to tell"),  # twice the error would have been enough
        ([0.1, 0.12, 0.11], 0.1, "too small to tell"),
        ([0.1, 0.1], 0.0, "too small to tell"),
        ([0.0, 0.0, 0.0], 0.0, "too small to tell"),
        ([math.inf, math.inf, math.inf], 0.0, "reproduced"),
        ([math.inf, math.inf, 0.1], 0.0, "too small to tell"),
        ([-math.inf] * 3, 0.0, "not reproduced"),
        ([math.nan] * 3, 0.0, "too small to tell"),
    ],
)
def test_a_word_is_earned(differences, error, expected):
    assert word(differences, error) == expected


def test_without_the_data_it_says_so(place):
    table = command.load("figure7")
    assert "no ntrex128 in" in table.missing_data(place)
    assert "no ntrex128 in" in page([table], place)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_claim_and_column_of_a_table_is_measured(table, place):
    record_all(place, tables=[table])
    seeds = table.results(place)
    for claim in table.claims:
        assert len(claim.values(seeds)) == len(table.seeds), claim.name
        assert "not measured" not in claim.verdict(seeds)
    for runs in seeds:
        for row in table.rows:
            assert len(row.paper) <= len(table.columns)
            for column in table.columns:
                column.measure(runs[row.name], runs)
    text = page([table], place)
    assert "not measured" not in text.lower()
    heads, line, *lines = (line for line in text.splitlines() if line.startswith("|"))
    for other in (line, *lines[: len(table.rows)]):
        assert other.count("|") == heads.count("|")


@pytest.fixture
def few(monkeypatch):
    """Three tables, instead of all."""
    monkeypatch.setattr(command, "TABLES", ("figure1", "table1", "table11"))
    return load_all()


def test_what_is_missing_is_said_and_not_guessed(place, few):
    record_all(place, seeds=[0])
    text = page(few, place)
    assert "Not measured: dense: seed 1, 2, 3, 4; 2 experts: seed 1, 2, 3, 4;" in text
    assert "| reproduced |" not in text
    assert "| not reproduced |" not in text
    assert not command.whole(few, place)
    record_all(place)
    assert command.whole(few, place)
    assert not command.whole(load_all([0, 1]), place)
    Run(DENSE, 1, place).file.write_text(json.dumps({"failed": "OSError: full disk", "seed": 1}))
    assert not command.whole(few, place)
    assert "seed 1 (failed: OSError: full disk)" in page(few, place)


def test_docs_are_written_from_finished_runs_alone_and_results_are_kept(
    monkeypatch, place, few, tmp_path, capsys
):
    monkeypatch.setattr(command, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(command, "RECORD", tmp_path / "kept")
    monkeypatch.setattr(command, "find_spec", lambda name: True)
    for table in few:
        monkeypatch.setitem(vars(table), "picture", None)

    def start(*more):
        ask = ["paper", "--out", str(place.out), "--data", str(place.data), *more]
        monkeypatch.setattr(sys, "argv", ask)
        command.main()

    record_all(place, seeds=[0, 1])
    start("--only-write")
    assert "Not measured: dense: seed 2" in (place.out / "results.md").read_text()
    assert not command.DOCS.exists()
    record_all(place)
    start("--only-write", "table1")
    assert "## Table 1" in capsys.readouterr().out
    assert "## Table 11" in (command.DOCS / "results.md").read_text()
    assert "not measured" not in (command.DOCS / "results.md").read_text().lower()
    kept = {path.name for path in command.RECORD.iterdir()}
    assert kept == {path.name for path in place.out.glob("*.json")}


def test_a_task_that_is_not_learnt_has_no_winner():
    claim = command.load("table5").claims[0]

    def score(value):
        scores = {"accuracy": {"value": value, "low": value - 1, "high": value + 1}}
        return Result({"figures": {"metric": "accuracy", "scores": scores, "one_answer": 50.0}})

    def seeds(dense, sparse):
        pairs = zip(dense, sparse, strict=True)
        return [{"sst2, dense": score(a), "sst2, Switch": score(b)} for a, b in pairs]

    assert claim.verdict(seeds([60, 61, 60], [70, 71, 70.5])) == "reproduced"
    assert claim.verdict(seeds([40, 41, 40], [49, 50, 49.5])) == "too small to tell: not learnt"


def test_a_claim_counts_only_seeds_that_have_its_runs():
    claim = Claim("better", "+1", lambda runs: runs["a"].quality - runs["b"].quality)
    one = Result({"figures": {"evaluations": [{"evaluation_loss": 1.0}]}})
    assert claim.verdict([{"a": one, "b": one}, {"a": one}, {}]) == "not measured: 1 of 3 seeds"
