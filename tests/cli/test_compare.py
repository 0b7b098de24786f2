"""switchlm compare on a small text."""

import json
import math
import random

import pytest
from typer.testing import CliRunner

from switchlm.cli.main import app
from switchlm.cli.train import parse_duration
from switchlm.errors import ConfigError

SMALL = [
    *("--preset", "nano", "--set", "training.steps=20", "--set", "training.log_every=5"),
    *("--set", "training.evaluate_every=5", "--set", "data.batch_size=4"),
    *("--set", "data.input_length=48", "--set", "training.evaluate_batches=1"),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    words = ["route", "every", "token", "to", "one", "expert", "and", "keep", "the", "load", "even"]
    draw = random.Random(0)
    for document in range(60):
        lines = [" ".join(draw.choices(words, k=12)) for _ in range(12)]
        (folder / f"{document}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def invoke(*arguments):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


@pytest.fixture(scope="module")
def compared(tmp_path_factory, text):
    """A comparison on two sources: its folder, and what was printed."""
    folder = tmp_path_factory.mktemp("compared")
    (folder / "other").mkdir()
    for path in text.glob("*.txt"):
        (folder / "other" / path.name).write_text(path.read_text()[::-1])
    both = ("--data", f"there={text}", "--data", f"back={folder / 'other'}")
    result = invoke("--out", folder / "race", *both, *SMALL)
    assert result.exit_code == 0, result.output
    return folder / "race", result.output


def test_both_runs_and_the_result_are_on_disk(compared):
    out, _ = compared
    stored = json.loads((out / "compare.json").read_text())
    assert {"dense_loss", "sparse_loss", "step_ratio", "time_ratio", "seeds"} <= set(stored)
    assert stored["steps"] == 20
    assert stored["configuration"]["dense"]["model"]["num_experts"] == 0
    assert stored["parameters"]["sparse"] > stored["parameters"]["dense"]
    for name in ("dense", "sparse"):
        lines = (out / name / "metrics.jsonl").read_text().splitlines()
        evaluations = [json.loads(line) for line in lines if "evaluation_loss" in line]
        assert [line["step"] for line in evaluations] == [5, 10, 15, 20]
        assert evaluations[-1]["evaluation_loss"] == stored[f"{name}_loss"]
        bits = evaluations[-1]["evaluation_bits_per_byte"]
        assert bits == stored["bits_per_byte"][name]
        # A byte per token but for end tokens and sentinels, which are targets and no text.
        assert 1 < bits / (stored[f"{name}_loss"] / math.log(2)) < 2
        assert (out / name / "model" / "model.safetensors").exists()
    assert "dense twin" in (out / "report.html").read_text()
    assert json.loads((out / "sparse" / "routing.json").read_text())[0]["load_E"]
    assert not (out / "dense" / "routing.json").exists()


def test_sources_are_compared_one_by_one(compared):
    out, printed = compared
    assert "sources with a lower loss" in printed
    sources = json.loads((out / "compare.json").read_text())["sources"]
    assert list(sources) == ["there", "back"]
    layers = json.loads((out / "sparse" / "routing.json").read_text())
    assert set(layers[0]["source_load"]) == {"there", "back"}


def test_both_models_train_on_the_same_batches_for_the_same_steps(tmp_path, text):
    out = tmp_path / "race"
    result = invoke("--out", out, "--data", text, *SMALL, "--budget", "3s", "--json")
    assert result.exit_code == 0, result.output
    stored = json.loads((out / "compare.json").read_text())
    assert json.loads(result.stdout) == stored
    tokens = []
    for name in ("dense", "sparse"):
        lines = (out / name / "metrics.jsonl").read_text().splitlines()
        tokens.append([json.loads(x)["tokens"] for x in lines if "tokens" in x])
    assert tokens[0] == tokens[1]
    assert stored["steps"] == 5 * len(tokens[0])


def test_an_earlier_comparison_is_only_replaced_on_request(tmp_path, text):
    out = tmp_path / "race"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    refused = invoke("--out", out, "--data", text, *SMALL)
    assert refused.exit_code == 2
    assert "no comparison" in refused.output
    refused = invoke("--out", out, "--data", text, *SMALL, "--overwrite")
    assert refused.exit_code == 2
    assert "no comparison" in refused.output
    assert (out / "mine.txt").read_text() == "keep"


def test_a_dense_model_has_no_twin(tmp_path, text):
    result = invoke("--out", tmp_path / "race", "--data", text, "--preset", "dense-nano")
    assert result.exit_code == 2
    assert "num_experts is 0" in result.output


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("6m", 360), ("1.5h", 5400), ("7", 7)])
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "-3s", "soon", "0", "infm", "nan"])
def test_invalid_durations_are_errors(text):
    with pytest.raises(ConfigError, match="duration"):
        parse_duration(text)
