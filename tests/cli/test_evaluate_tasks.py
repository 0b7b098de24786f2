import json
import re
import sys

import pytest
import torch

from switchlm.data.tasks.mixture import TaskOptions
from switchlm.data.text.tokenizer import Tokenizer
from switchlm.huggingface import load
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer
from switchlm.recipes.finetune_config import FinetuneConfig
from switchlm.recipes.trained_with import metadata_of

SENTENCES = [("fine work", 1), ("dull stuff", 0), ("a joy", 1), ("so so", 0), ("great", 1)]


@pytest.fixture(scope="session")
def other(tmp_path_factory):
    """A folder with another untrained nano model."""
    folder = tmp_path_factory.mktemp("models") / "other"
    torch.manual_seed(1)
    load.save(SwitchTransformer(preset("nano")), Tokenizer.bytes(), folder)
    return str(folder)


@pytest.fixture
def data(tmp_path):
    """A folder with the validation splits of SST-2 and of RTE, as GLUE distributes them."""
    rows = "".join(f"{text}\t{label}\n" for text, label in SENTENCES)
    pairs = "".join(
        f"{n}\tA {n}.\tB {n}.\t{name}entailment\n" for n, name in enumerate(["", "not_"])
    )
    for name, text in (
        ("SST-2", f"sentence\tlabel\n{rows}"),
        ("RTE", f"index\tsentence1\tsentence2\tlabel\n{pairs}"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "dev.tsv").write_text(text)
    return tmp_path


SHORT = ("--max-new-tokens", 3, "--batch-size", 2)


def test_a_task_is_scored_and_its_predictions_written(run_json, nano, data, tmp_path):
    predictions = tmp_path / "predictions.jsonl"
    line = ("evaluate", "--model", nano, "--task", "sst2", "--data", data)
    result = run_json(*line, "--rank-labels", "--predictions", predictions)
    assert result["model"] == nano
    found = result["tasks"]["sst2"]
    assert found["examples"] == 5
    written = [json.loads(text) for text in predictions.read_text("utf-8").splitlines()]
    assert [one["input"] for one in written] == [f"sst2 sentence: {text}" for text, _ in SENTENCES]
    assert all(one["references"] == [one["target"]] for one in written)
    right = [one["prediction"] == one["target"] for one in written]
    assert found["metrics"]["accuracy"]["value"] == pytest.approx(100 * sum(right) / 5)
    low, high = found["metrics"]["accuracy"]["interval"]
    assert 0 <= low <= found["metrics"]["accuracy"]["value"] <= high <= 100


def test_several_tasks_have_an_average(run, run_json, nano, data):
    line = ("evaluate", "--model", nano, "--task", "sst2", "--task", "rte", "--rank-labels")
    result = run_json(*line, "--data", data)
    values = [part["metrics"]["accuracy"]["value"] for part in result["tasks"].values()]
    assert result["average"] == pytest.approx(sum(values) / 2)
    each = ("--data", f"sst2={data}/SST-2/dev.tsv", "--data", f"rte={data / 'RTE'}")
    assert run_json(*line, *each)["tasks"] == result["tasks"]
    shown = run(*line, "--data", data)
    assert shown.exit_code == 0
    assert f"{result['average']:.2f}" in shown.stdout
    assert "2 examples" in shown.stdout


def test_baselines_stand_beside_scores_and_a_model_that_does_not_beat_them_is_named(
    run, run_json, nano, data
):
    line = ("evaluate", "--model", nano, "--task", "sst2", "--data", data)
    found = run_json(*line, *SHORT)["tasks"]["sst2"]
    assert found["baselines"] == {
        "answer": "positive",
        "majority": {"accuracy": pytest.approx(60)},
        "chance": {"accuracy": pytest.approx(50)},
    }
    assert found["metrics"]["accuracy"]["value"] == 0
    shown = run(*line, *SHORT)
    assert "most frequent answer 60.00" in shown.stdout
    assert "chance 50.00" in shown.stdout
    note = "sst2: accuracy 0.00 is not better than the 60.00 of always answering 'positive'"
    assert note in " ".join(shown.output.split())


def test_several_models_are_summarised(run, run_json, nano, other, data):
    line = ("evaluate", "--model", nano, "--model", other, "--task", "sst2", "--data", data)
    result = run_json(*line, "--rank-labels")
    values = [one["tasks"]["sst2"]["metrics"]["accuracy"]["value"] for one in result["models"]]
    summary = result["summary"]["sst2"]["accuracy"]
    assert summary["values"] == values
    assert summary["mean"] == pytest.approx(sum(values) / 2)
    assert summary["std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    shown = run(*line, "--rank-labels").stdout
    assert re.search(rf"mean\W+{summary['mean']:.2f}", shown)
    assert re.search(rf"standard deviation\W+{summary['std']:.2f}", shown)


def test_losses_of_several_models_are_summarised(run_json, run, nano, other, text_file):
    short = ("--data", text_file, "--input-length", 48, "--batch-size", 4, "--batches", 2)
    line = ("evaluate", "--model", nano, "--model", other, *short)
    result = run_json(*line)
    losses = [one["loss"] for one in result["models"]]
    (summary,) = result["summary"]["story"].values()
    assert summary["values"] == losses
    assert f"{summary['mean']:.4f}" in run(*line).stdout


def test_a_loss_has_an_interval(run_json, nano, text_file):
    short = ("--data", text_file, "--input-length", 48, "--batch-size", 4, "--batches", 3)
    result = run_json("evaluate", "--model", nano, *short)
    assert result["interval"][0] < result["loss"] < result["interval"][1]
    assert result["sources"]["story"]["interval"] == result["interval"]


def test_your_own_file_is_scored_in_full_or_limited(run, run_json, nano, tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("question,answer\n" + "".join(f"{n} + {n},{2 * n}\n" for n in range(40)))
    line = ("evaluate", "--model", nano, "--task", path, "--input-column", "question",
            "--target-column", "answer", "--metric", "exact_match", *SHORT)  # fmt: skip
    found = run_json(*line, "--limit", 4)["tasks"]["mine"]
    assert (found["examples"], list(found["metrics"])) == (4, ["exact_match"])
    assert run_json(*line)["tasks"]["mine"]["examples"] == 40
    assert 0 < run_json(*line, "--split", "validation")["tasks"]["mine"]["examples"] < 15
    cut = run(*line, "--input-length", 4)
    assert "inputs were cut to 4 tokens" in cut.stderr
    assert "40 outputs were cut off" in cut.stderr


def test_a_run_is_scored_with_its_own_input_length(run_json, run, nano, data, tmp_path):
    load.save(*load.load(nano), tmp_path / "run" / "model")
    config = tmp_path / "run" / "config.yaml"
    config.write_text("finetune: {model: m, tasks: [sst2], input_length: 18}\n")
    line = ("evaluate", "--model", tmp_path / "run", "--task", "sst2", "--data", data, *SHORT)
    assert "inputs were cut to 18 tokens" in run(*line).stderr
    assert "cut to" not in run(*line, "--input-length", 60).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "sst3"], "Did you mean 'sst2'"),
        (["--task", "sst2", "--data", "{data}", "--split", "train"], "no train split of 'sst2'"),
        (["--task", "sst2", "--data", "/no/such"], "no file or folder '/no/such'"),
        (["--task", "sst2", "--data", "{data}/RTE/bare.tsv"], "take the validation split"),
        (["--task", "rte", "--data", "{data}/SST-2"], "'sentence1'"),
        (["--task", "rte", "--data", "sst2={data}"], "is for no task here"),
        (["--task", "sst2", "--data", "{data}", "--metric", "f1"], "its own columns"),
        (["--task", "{data}/mine.jsonl", "--metric", "exact"], "Did you mean 'exact_match'"),
        (["--task", "{data}/mine.jsonl", "--template", "{{inputs}}"], "Did you mean 'input'"),
        (["--task", "{data}/mine.jsonl", "--rank-labels"], "Name the possible ones with --label"),
        (["--task", "{data}/mine.jsonl", "--data", "{data}"], "--task is a file itself"),
        (["--task", "{data}/empty.jsonl"], "is empty"),
        (["--task", "{data}/label.tsv", "--template", "x", "--skip-empty"], "is empty"),
        (["--task", "sst2", "--data", "{data}/label.tsv"], "label '7'"),
        (["--task", "sst2", "--data", "{data}", "--predictions", "/no/such/file"], "Cannot write"),
        (["--split", "test"], "--split is about tasks"),
        (["--target-template", "{{target}}"], "--target-template is about tasks"),
        (["--input-column", "question"], "--input-column is about tasks"),
        (["--task", "sst2", "--data", "{data}", "--batches", "3"], "--batches is about text"),
        (["--task", "squad"], "switchlm[hub]"),
    ],
)
def test_mistakes_are_errors(refuse, nano, data, monkeypatch, arguments, message):
    monkeypatch.setitem(sys.modules, "datasets", None)
    different = "".join(f'{{"input": "a", "target": "{n}"}}\n' for n in range(60))
    (data / "mine.jsonl").write_text(different)
    (data / "empty.jsonl").write_text("\n")
    (data / "RTE" / "bare.tsv").write_text("index\tsentence\n0\tfine\n")
    (data / "label.tsv").write_text("sentence\tlabel\ttarget\nfine\t7\t\n")
    arguments = [argument.format(data=data) for argument in arguments]
    assert message in refuse("evaluate", "--model", nano, *arguments)


def test_experts_may_stay_on_disk(run_json, nano, data):
    line = ("evaluate", "--model", nano, "--task", "sst2", "--data", data / "SST-2")
    found = run_json(*line, "--expert-memory", "20kB")
    assert found.pop("experts")["bytes_read"] > 0
    assert found == run_json(*line)


def test_the_template_and_lengths_of_the_fine_tuning_are_remembered(run, run_json, nano, tmp_path):
    file = tmp_path / "qa.jsonl"
    file.write_text('{"question": "who?", "answer": "me"}\n{"question": "what?", "answer": "it"}\n')
    model, tokenizer = load.load(nano)
    columns = TaskOptions(template="q: {question}", target_column="answer", metrics=("f1",))
    tuned = FinetuneConfig(
        model=nano, tasks=(str(file),), columns=columns, input_length=6, target_length=3
    )
    about = metadata_of(model, None, tuned)
    load.save(model, tokenizer, tmp_path / "tuned", metadata=about)
    written = tmp_path / "written.jsonl"
    line = ("evaluate", "--model", tmp_path / "tuned", "--task", file, "--predictions", written)
    found = run_json(*line)
    assert list(found["tasks"]["qa"]["metrics"]) == ["f1"]
    assert found["settings"]["input_length"] == 6
    assert found["tasks"]["qa"]["truncated_inputs"] == 2
    assert [json.loads(text)["input"] for text in written.open()] == ["q: who?", "q: what?"]
    assert "template 'q: {question}'" in run(*line).stderr
    run_json(*line, "--input-column", "question")
    assert [json.loads(text)["input"] for text in written.open()] == ["who?", "what?"]
    both = run(*line, "--model", nano)
    assert both.exit_code == 2
    assert "different templates" in both.stderr
