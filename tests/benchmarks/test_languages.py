"""Figures 7 and 8 on parallel text of the test's own; the commands of the guide to languages."""

import json
import os
import random
import re
import shlex
from pathlib import Path

import pytest
import typer
from benchmarks.paper import figure7, plans
from benchmarks.paper import runs as runs_module
from benchmarks.paper.runs import Place, Run, work
from benchmarks.paper.table import Result

from switchlm.cli.main import load

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "guides" / "languages.md"
ALPHABETS = {"xx": "abcde", "yy": "абвгд", "zz": "αβγδε"}


@pytest.fixture
def place(tmp_path):
    """Three languages, 30 documents of 4 lines."""
    folder = tmp_path / "data" / "ntrex128"
    folder.mkdir(parents=True)
    (tmp_path / "out").mkdir()
    (folder / "LANGUAGES.tsv").write_text("xx Exish\nyy\tWhy (Cyrillic)\n")
    documents = [f"d{number}" for number in range(30) for _ in range(4)]
    (folder / "DOCUMENT_IDS.tsv").write_text("\n".join(documents) + "\n")
    for code, letters in ALPHABETS.items():
        draw = random.Random(0)
        lines = ["".join(draw.choices(letters + " ", k=40)) for _ in documents]
        (folder / f"news.{code}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Place(tmp_path / "data", tmp_path / "out", most_steps=4)


def test_a_small_run_measures_every_language(place, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(runs_module.signal, "signal", lambda *_: None)
    monkeypatch.setattr(plans, "EVALUATE_BATCHES", 2)
    figure7.prepare(place)
    figure7.prepare(place)  # once is enough
    records = [json.loads(line) for line in (place.out / "languages" / "Exish.jsonl").open()]
    assert [record["document"] for record in records] == [f"d{number}" for number in range(30)]
    assert len(records[0]["text"].splitlines()) == 4
    runs = {}
    for row in figure7.TABLE.rows:
        run = Run(row.plan, 0, place)
        work(run, os.getppid())
        assert "figures" in run.record(), run.record()
        runs[row.name] = Result(run.record())
    by_source = runs["Switch"].evaluations[-1]["evaluation_loss_by_source"]
    assert set(by_source) == {"Exish", "Why (Cyrillic)", "zz"}
    assert len(figure7.speeds(runs)) == 3
    assert figure7.better(runs) in (0, pytest.approx(100 / 3), pytest.approx(200 / 3), 100)


def test_files_of_another_length_are_refused(place):
    (place.data / "ntrex128" / "news.yy.txt").write_text("one line\n")
    with pytest.raises(SystemExit, match="has 1 lines, the documents 120"):
        figure7.prepare(place)


def guide_commands():
    blocks = re.findall(r"^```\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.S | re.M)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("switchlm ")]


@pytest.mark.parametrize("line", guide_commands())
def test_the_commands_of_the_guide_parse(line):
    _, verb, *arguments = shlex.split(line)
    command = load(verb)
    assert isinstance(command, typer.core.TyperCommand)
    command.make_context(verb, arguments)
