"""benchmarks/languages.py on parallel text of the test's own, and the commands of its guide."""

import json
import os
import random
import re
import shlex
import sys
from pathlib import Path

import pytest
import typer
from tests import commands

from switchlm.cli.main import load
from switchlm.config import read_yaml
from switchlm.model import count
from switchlm.recipes.compare import configure
from switchlm.recipes.config import run_config

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "languages.py"
GUIDE = ROOT / "docs" / "guides" / "languages.md"
ALPHABETS = {"xx": "abcde", "yy": "абвгд", "zz": "αβγδε"}


@pytest.fixture
def parallel_text(tmp_path):
    """Three languages, 30 documents of 4 lines."""
    folder = tmp_path / "parallel"
    folder.mkdir()
    (folder / "LANGUAGES.tsv").write_text("xx Exish\nyy\tWhy (Cyrillic)\n")
    documents = [f"d{number}" for number in range(30) for _ in range(4)]
    (folder / "DOCUMENT_IDS.tsv").write_text("\n".join(documents) + "\n")
    for code, letters in ALPHABETS.items():
        draw = random.Random(0)
        lines = ["".join(draw.choices(letters + " ", k=40)) for _ in documents]
        (folder / f"news.{code}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def run(tmp_path, *arguments):
    environment = {**os.environ, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return commands.run(command, cwd=tmp_path, env=environment)


def test_a_small_run_measures_every_language(tmp_path, parallel_text):
    small = ["training.steps=8", "training.evaluate_every=4", "training.evaluate_batches=2"]
    small += ["data.batch_size=8", "training.log_every=4", "data.held_out_share=0.2"]
    overrides = [part for one in small for part in ("--set", one)]
    runs = tmp_path / "runs"
    done = run(tmp_path, "--data", parallel_text, "--runs", runs, "--draft", *overrides)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\| seed 0 \| 8 \| .* of 3 \|", done.stdout)
    assert {"Exish", "Why (Cyrillic)", "zz"} <= set(
        re.findall(r"^\| ([^|]+) \|", done.stdout, re.M)
    )
    records = [json.loads(line) for line in (runs / "texts" / "Exish.jsonl").open()]
    assert [record["document"] for record in records] == [f"d{number}" for number in range(30)]
    assert len(records[0]["text"].splitlines()) == 4
    report = (runs / "laptop-0" / "report.html").read_text()
    assert "Why (Cyrillic)" in report


def test_without_the_text_it_says_so(tmp_path):
    done = run(tmp_path, "--data", tmp_path / "none")
    assert done.returncode == 0
    assert "nothing is measured" in done.stdout


def test_files_of_another_length_are_refused(tmp_path, parallel_text):
    (parallel_text / "news.yy.txt").write_text("one line\n")
    done = run(tmp_path, "--data", parallel_text, "--runs", tmp_path / "runs", "--draft")
    assert done.returncode != 0
    assert "has 1 lines, DOCUMENT_IDS.tsv 120" in done.stderr


@pytest.mark.parametrize("scale", ["laptop", "gpu"])
def test_the_twins_take_equal_flops(scale):
    pair = configure(path=SCRIPT.with_suffix("") / f"{scale}.yaml", sources=["python:stdlib"])
    sparse, dense = (count.flops_per_token(run.model, 64, 20) for run in (pair.sparse, pair.dense))
    assert 1 <= sparse / dense < 1.1
    assert pair.sparse.data.mixing_exponent == 0.3


def test_the_papers_scale_is_that_of_mt5_base():
    values = read_yaml(SCRIPT.with_suffix("") / "paper.yaml")
    sparse = run_config(values=values)
    dense = run_config(values=values, overrides=["model.num_experts=0"])
    assert count.parameters(dense.model) == pytest.approx(580e6, rel=0.02)
    flops = [count.flops_per_token(run.model, 1024, 229) for run in (sparse, dense)]
    assert flops[0] == pytest.approx(flops[1], rel=0.01)
    assert sparse.data.batch_size * sparse.data.input_length == 2**20


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
