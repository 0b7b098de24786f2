import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from switchlm.data.text.tokenizer import Tokenizer
from switchlm.huggingface import load
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer
from switchlm.training.monitor import read_metrics

CLOCK = {"seconds", "tokens_per_second"}
SHORT = (
    "finetune.input_length=16", "finetune.target_length=4", "finetune.batch_size=8",
    "training.steps=6", "training.log_every=2", "training.evaluate_every=3",
    "training.checkpoint_every=2",
)  # fmt: skip


@pytest.fixture
def task(tmp_path):
    path = tmp_path / "first.jsonl"
    lines = [json.dumps({"input": f"{'ab'[n % 2]}{n}", "target": "ab"[n % 2]}) for n in range(60)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def command(nano, task, tmp_path):
    """Return the command line of a short run in OUT, with some options changed."""

    def command(*more, **options):
        usual = {"model": nano, "task": task, "out": tmp_path / "run"} | options
        line = ["finetune"]
        for name, value in usual.items():
            line += [] if value is None else [f"--{name}", str(value)]
        for setting in SHORT:
            line += ["--set", setting]
        return [*line, *map(str, more)]

    return command


def timeless(out):
    lines = read_metrics(out / "metrics.jsonl")
    return [{key: line[key] for key in line.keys() - CLOCK} for line in lines]


def test_it_prints_what_it_writes(run, command, tmp_path):
    result = run(*command("--json", "--metric", "accuracy"))
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert lines == read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if "score" in line] == [3, 6]
    assert "Best score" in result.stderr


def test_your_own_template(run, command, tmp_path):
    columns = ("--template", "which: {input}?", "--target-template", "it is {target}")
    assert run(*command(*columns, "--set", "finetune.target_length=8")).exit_code == 0
    config = (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")
    assert "which: {input}?" in config


@pytest.mark.slow
def test_a_stopped_and_killed_run_ends_like_an_uninterrupted_one(run, command, tmp_path):
    """SIGTERM saves and exits with 143; SIGKILL does not; the result is the same bit for bit."""
    long = ("--set", "training.steps=60", "--set", "training.log_every=1", "--json")
    assert run(*command(*long, out=tmp_path / "whole")).exit_code == 0
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for at, number in ((9, signal.SIGTERM), (21, signal.SIGKILL), (41, signal.SIGINT)):
        resume = () if at == 9 else ("--resume",)
        process = subprocess.Popen(
            [sys.executable, "-m", "switchlm", *command(*long, *resume)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for line in process.stdout:
            if json.loads(line)["step"] >= at:
                process.send_signal(number)
                break
        process.stdout.read()
        status = {signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130}
        assert process.wait(timeout=60) == status[number]
    assert run(*command(*long, "--resume")).exit_code == 0
    assert timeless(tmp_path / "run") == timeless(tmp_path / "whole")
    for name in ("model.safetensors", "config.json"):
        one, other = (tmp_path / out / "model" / name for out in ("run", "whole"))
        assert one.read_bytes() == other.read_bytes()


MISTAKES = {
    "no model": ({"model": None}, (), "no model to fine-tune: name one with --model"),
    "no task": ({"task": None}, (), "no task to fine-tune on: name one with --task"),
    "missing model": ({"model": "no/such/model"}, (), "There is no folder 'no/such/model'"),
    "unknown task": ({"task": "sst"}, (), "Did you mean 'sst2'?"),
    "rank too large": ({"lora-rank": 33}, (), "rank 33 of the adapters is larger than 32"),
    "rank zero": ({"lora-rank": 0}, (), "finetune.lora_rank must lie in [1, 65536], got 0"),
    "rank and part": (
        {"lora-rank": 4, "trainable": "router"},
        (),
        "so only adapters train, but finetune.trainable is 'router'",
    ),
    "unknown part": ({"trainable": "experts"}, (), "Did you mean 'expert'?"),
    "long target": (
        {},
        ("--target-template", "it is {target}"),
        "targets of the task 'first' are longer than 4 tokens",
    ),
    "missing column": ({}, ("--input-column", "text"), "has no column 'text'; it has: input"),
    "unknown metric": ({}, ("--metric", "acuracy"), "Did you mean 'accuracy'?"),
    "another shape": (
        {},
        ("--set", "model.num_experts=8"),
        "model.num_experts is 8, but the model to fine-tune has 4",
    ),
    "no evaluation": (
        {},
        ("--set", "training.evaluate_every=null"),
        "training.evaluate_every is null, but a fine-tuning run keeps the model of the best score",
    ),
    "unknown setting": ({}, ("--set", "finetune.patiense=3"), "Did you mean 'patience'?"),
    "no patience": ({}, ("--set", "finetune.patience=0"), "finetune.patience must lie in"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_paragraph_and_leave_no_folder(refuse, command, tmp_path, mistake):
    options, more, message = MISTAKES[mistake]
    assert message in refuse(*command(*more, **options))
    assert not (tmp_path / "run").exists()


def test_an_empty_split_is_an_error(refuse, command, tmp_path):
    folder = tmp_path / "sst2"
    folder.mkdir()
    (folder / "train.tsv").write_text("sentence\tlabel\n", encoding="utf-8")
    (folder / "dev.tsv").write_text("sentence\tlabel\nfine\t1\n", encoding="utf-8")
    message = refuse(*command(task="sst2", data=folder))
    assert "The train split of 'sst2' is empty" in message


def test_a_vocabulary_without_the_labels_is_an_error(refuse, command, tmp_path):
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "positive": 3}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": None, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None,
        "decoder": None, "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }  # fmt: skip
    model = SwitchTransformer(preset("nano"))
    load.save(model, Tokenizer.from_json(json.dumps(tokenizer)), tmp_path / "words")
    folder = tmp_path / "SST-2"
    folder.mkdir()
    for split in ("train", "dev"):
        (folder / f"{split}.tsv").write_text("sentence\tlabel\nfine\t1\n", encoding="utf-8")
    message = refuse(*command(model=tmp_path / "words", task="sst2", data=folder))
    assert "cannot learn the task 'sst2': its tokenizer turns the label 'negative'" in message


def test_a_run_is_resumed_with_its_own_settings(run, refuse, run_unchanged, command, tmp_path):
    assert run(*command()).exit_code == 0
    assert "There is a run in" in refuse(*command())
    other = tmp_path / "other.jsonl"
    other.write_text('{"input": "a", "target": "b"}\n' * 9, encoding="utf-8")
    message = refuse(*command("--resume", task=other))
    assert "finetune.tasks [" in message
    assert "cannot be resumed with" in message
    assert "finetune.lora_rank 2 (the run has None)" in refuse(
        *command("--resume", **{"lora-rank": 2})
    )
    longer = ("--resume", "--set", "finetune.input_length=40")
    assert "finetune.input_length 40 (" in refuse(*command(*longer))
    before = timeless(tmp_path / "run")
    assert run("finetune", "--out", tmp_path / "run", "--resume").exit_code == 0
    assert timeless(tmp_path / "run") == before
    shorter = ("finetune", "--out", tmp_path / "run", "--resume", "--set", "training.steps=4")
    said = run_unchanged(tmp_path / "run", *shorter)
    assert "has 6 steps already, and training.steps is 4: nothing was trained" in said
    shutil.rmtree(tmp_path / "run" / "model")
    message = refuse("finetune", "--out", tmp_path / "run", "--resume")
    assert "The model of the best step" in message
    assert "is gone" in message


def test_a_base_that_has_changed_is_an_error(run, refuse, command, tmp_path, nano):
    """A checkpoint contains trained weights only; the others must be unchanged."""
    base = tmp_path / "base"
    shutil.copytree(nano, base)
    assert run(*command(model=base, trainable="router")).exit_code == 0
    again = ("finetune", "--out", tmp_path / "run", "--resume")
    assert run(*again).exit_code == 0
    model, tokenizer = load.load(base)
    model.embedding.weight.data[0, 0] += 1
    load.save(model, tokenizer, base)
    assert "is not the one that the run in" in refuse(*again)


def test_a_pre_training_run_is_not_fine_tuned_further_by_resume(refuse, command, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("training: {steps: 5}\n", encoding="utf-8")
    assert "is not a fine-tuning run" in refuse(*command("--resume"))
    assert "is not a fine-tuning run" in refuse("finetune", "--out", tmp_path / "run", "--resume")
