"""switchlm distill and pretrain --init-from; each mistake is one paragraph."""

import dataclasses
import json
import shutil

import pytest
import torch

from switchlm.data.text.tokenizer import Tokenizer
from switchlm.huggingface import load
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer

SMALL = [
    *("--set", "training.steps=4", "--set", "training.evaluate_every=4"),
    *("--set", "data.batch_size=2", "--set", "data.input_length=32"),
    *("--set", "training.evaluate_batches=1", "--set", "data.held_out_share=0.2"),
]


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(12):
        words = " ".join(f"{number} and {other} are {number + other};" for other in range(30))
        (folder / f"{number}.txt").write_text(words)
    return folder


@pytest.fixture
def arguments(nano, texts, tmp_path):
    return ["distill", "--teacher", nano, "--data", texts, "--out", tmp_path / "run", *SMALL]


def model_folder(folder, config, tokenizer):
    torch.manual_seed(1)
    load.save(SwitchTransformer(config), tokenizer, folder)
    return folder


@pytest.fixture
def other_vocabulary(tmp_path):
    """A dense model of another vocabulary, of the same size."""
    tokenizer = Tokenizer.bytes(99)
    assert tokenizer.vocabulary_size == preset("dense-nano").vocabulary_size
    return model_folder(tmp_path / "other", preset("dense-nano"), tokenizer)


def test_the_run_ends_with_the_result_of_the_paper(run, arguments, tmp_path):
    result = run(*arguments, "--baseline", "9.5", "--cache-logits", tmp_path / "logits")
    assert result.exit_code == 0, result.output
    shown = " ".join(result.output.split())
    assert "nats per target); compression" in shown
    assert "dense baseline 9.5000" in shown
    assert '"top_k": 32' in (tmp_path / "logits" / "manifest.json").read_text()
    assert (tmp_path / "run" / "report.html").exists()


def test_json_is_the_result_alone(run_json, arguments, tmp_path):
    found = run_json(*arguments)
    assert found == json.loads((tmp_path / "run" / "distill.json").read_text())
    assert found["quality_kept"] is None


def test_a_student_can_be_evaluated_as_any_run(run, run_json, arguments, tmp_path):
    run(*arguments)
    found = run_json("evaluate", "--model", tmp_path / "run", "--batches", 1)
    expected = json.loads((tmp_path / "run" / "distill.json").read_text())["student_loss"]
    assert found["loss"] == pytest.approx(expected, rel=1e-5)


def test_resume_needs_nothing_but_the_folder(run, refuse, run_unchanged, arguments, tmp_path):
    out = tmp_path / "run"
    run(*arguments, "--set", "training.steps=2")
    assert "There is a run" in refuse(*arguments)
    result = run("distill", "--out", out, "--resume", "--set", "training.steps=4")
    assert result.exit_code == 0, result.output
    assert json.loads((out / "distill.json").read_text())["steps"] == 4
    assert "--teacher is given with --resume" in refuse(*arguments, "--resume")
    shorter = ("distill", "--out", out, "--resume", "--set", "training.steps=3")
    assert "has 4 steps already, and training.steps is 3" in run_unchanged(out, *shorter)


def test_a_missing_teacher(refuse, tmp_path):
    missing = tmp_path / "no-such-run"
    assert "no-such-run" in refuse("distill", "--teacher", missing, "--out", tmp_path / "run")
    (tmp_path / "empty").mkdir()
    message = refuse("distill", "--teacher", tmp_path / "empty", "--out", tmp_path / "run")
    assert "neither a model folder" in message
    assert "give one with --teacher" in refuse("distill", "--out", tmp_path / "run")


def test_a_student_of_another_vocabulary(refuse, arguments, other_vocabulary, tmp_path):
    message = refuse(*arguments, "--student", other_vocabulary)
    assert f"The student {str(other_vocabulary)!r}" in message
    assert "different vocabularies" in message
    small = dataclasses.replace(preset("dense-nano"), vocabulary_size=128)
    folder = model_folder(tmp_path / "small", small, Tokenizer.bytes())
    message = refuse(*arguments, "--student", folder)
    assert "has a vocabulary of 128 tokens" in message
    assert "one of 384" in message
    assert not (tmp_path / "run").exists()


def test_a_missing_student(refuse, arguments):
    assert "Did you mean 'dense-nano'?" in refuse(*arguments, "--student", "dense-nana")


def test_a_student_of_another_width(refuse, arguments, tmp_path):
    message = refuse(*arguments, "--student", "dense-nano", "--set", "model.d_model=64")
    assert "d_model 64 (not 32)" in message
    assert not (tmp_path / "run").exists()


def test_a_baseline_of_another_vocabulary(refuse, arguments, other_vocabulary):
    message = refuse(*arguments, "--baseline", other_vocabulary)
    assert f"The baseline {str(other_vocabulary)!r}" in message
    assert "different vocabularies" in message


@pytest.mark.parametrize("loss", ["-1.5", "nan", "0"])
def test_a_baseline_that_is_not_a_loss(refuse, arguments, loss):
    assert "must be a loss above 0" in refuse(*arguments, "--baseline", loss)


def test_top_k_above_the_vocabulary(refuse, arguments):
    message = refuse(*arguments, "--top-k", 385)
    assert "top_k is 385" in message
    assert "only 384 tokens" in message


def test_a_cache_of_another_teacher_or_cut_short(run, refuse, arguments, tmp_path):
    cache = tmp_path / "logits"
    cached = [*arguments, "--cache-logits", cache]
    assert run(*cached).exit_code == 0
    shutil.rmtree(tmp_path / "run")
    other = model_folder(tmp_path / "other", preset("nano"), Tokenizer.bytes())
    assert "its teacher is" in refuse(*cached, "--teacher", other)
    assert "its seed is 0" in refuse(*cached, "--set", "training.seed=1")
    assert "built for fewer steps" in refuse(*cached, "--set", "training.steps=5")
    assert "built from other text" in refuse(*cached, "--set", "data.mean_span=5")
    words = cache / "words.bin"
    words.write_bytes(words.read_bytes()[:-2])
    assert "words.bin has" in refuse(*cached)
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_is_not_the_teachers(refuse, arguments):
    message = refuse(*arguments, "--set", "data.tokenizer=unigram")
    assert "data.tokenizer is 'unigram'" in message
    assert "the teacher" in message


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("distillation.temperature=0", "distillation.temperature must be positive"),
        ("distillation.soft_weight=-1", "distillation.soft_weight must be 0 or more"),
        ("distillation.feedforward=mode", "distillation.feedforward is 'mode'"),
        ("distillation.start=scratch", "distillation.start is 'scratch'"),
        ("distillation.temprature=2", "Did you mean 'temperature'?"),
    ],
)
def test_settings_out_of_range(refuse, arguments, setting, message):
    assert message in refuse(*arguments, "--set", setting)


def test_both_weights_zero(refuse, arguments):
    zero = ["--set", "distillation.hard_weight=0", "--set", "distillation.soft_weight=0"]
    assert "are both 0" in refuse(*arguments, *zero)


@pytest.fixture
def task_file(tmp_path):
    path = tmp_path / "sums.jsonl"
    pairs = [{"input": f"{one} plus {one}", "target": str(2 * one)} for one in range(40)]
    path.write_text("\n".join(map(json.dumps, pairs)))
    return path


TASK = [
    *("--set", "training.steps=4", "--set", "training.evaluate_every=4"),
    *("--set", "finetune.batch_size=4", "--set", "finetune.input_length=24"),
    *("--set", "finetune.target_length=8", "--set", "finetune.evaluation_examples=2"),
]


def test_a_task_is_distilled_and_scored(run, nano, task_file, tmp_path):
    out = tmp_path / "run"
    arguments = ["distill", "--teacher", nano, "--task", task_file, "--out", out, *TASK]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert "Score: student" in result.output
    stored = json.loads((out / "distill.json").read_text())
    assert stored["configuration"]["finetune"]["tasks"] == [str(task_file)]


def test_tasks_that_do_not_fit(refuse, nano, task_file, tmp_path):
    start = ["distill", "--teacher", nano, "--out", tmp_path / "run", *TASK]
    assert "Did you mean 'sst2'?" in refuse(*start, "--task", "sst3")
    column = ["--set", "finetune.columns.input_column=question"]
    assert "has no column 'question'" in refuse(*start, "--task", task_file, *column)
    two = ["--data", tmp_path, "--data", tmp_path]
    assert "2 places for the data" in refuse(*start, "--task", "sst2", *two)
    short = ["--set", "finetune.target_length=2"]
    assert "longer than 2 tokens" in refuse(*start, "--task", task_file, *short)
    assert not (tmp_path / "run").exists()


def test_upcycling_takes_the_shape_of_the_dense_model(run, refuse, texts, tmp_path):
    dense = model_folder(tmp_path / "dense", preset("dense-nano"), Tokenizer.bytes())
    start = ["pretrain", "--init-from", dense, "--data", texts, *SMALL]
    experts = ["--set", "model.num_experts=2"]
    result = run(*start, *experts, "--out", tmp_path / "sparse")
    assert result.exit_code == 0, result.output
    assert load.load_config(tmp_path / "sparse").num_experts == 2
    assert load.load_config(tmp_path / "sparse").d_model == 32
    sparse = ["pretrain", "--init-from", tmp_path / "sparse", "--data", texts, *SMALL]
    message = refuse(*sparse, "--set", "model.num_experts=4", "--out", tmp_path / "more")
    assert "have 2 experts per Switch layer" in message
    assert not (tmp_path / "more").exists()
    assert "no-such" in refuse("pretrain", "--init-from", "./no-such", "--out", tmp_path / "x")
