"""Options that all training commands share."""

import json

import pytest
import yaml


@pytest.fixture
def task(tmp_path):
    path = tmp_path / "task.jsonl"
    path.write_text("\n".join(json.dumps({"input": f"{n}", "target": "a"}) for n in range(8)))
    return path


@pytest.mark.parametrize("command", ["pretrain", "finetune", "distill", "compare"])
def test_a_device_that_is_not_there_is_refused_at_once(
    command, refuse, nano, text_file, task, tmp_path
):
    arguments = {
        "pretrain": ("--preset", "nano", "--data", text_file),
        "finetune": ("--model", nano, "--task", task),
        "distill": ("--teacher", nano, "--data", text_file),
        "compare": ("--preset", "nano", "--data", text_file),
    }[command]
    for device in ("abacus", "meta"):
        message = refuse(command, *arguments, "--out", tmp_path / "run", "--device", device)
        assert f"Cannot compute on the device '{device}'" in message
    assert not (tmp_path / "run").exists()


def test_the_device_of_a_run_is_in_its_configuration(run, text_file, tmp_path):
    arguments = ("pretrain", "--preset", "nano", "--data", text_file, "--out", tmp_path / "run")
    settings = ("data.tokenizer=bytes", "data.batch_size=2", "data.input_length=16")
    stated = (
        f"--set={one}" for one in (*settings, "training.steps=1", "training.evaluate_every=null")
    )
    done = run(*arguments, *stated, "--device", "cpu")
    assert done.exit_code == 0, done.output
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["training"]["device"] == "cpu"


def test_a_run_beyond_the_wanted_steps_is_left_as_it_is(run, run_unchanged, text_file, tmp_path):
    out = tmp_path / "run"
    arguments = ("pretrain", "--preset", "nano", "--data", text_file, "--out", out)
    settings = ("data.tokenizer=bytes", "data.batch_size=2", "data.input_length=16")
    stated = (
        f"--set={one}" for one in (*settings, "training.steps=3", "training.evaluate_every=null")
    )
    assert run(*arguments, *stated).exit_code == 0
    resume = ("pretrain", "--out", out, "--resume", "--set=training.steps=2")
    assert "has 3 steps already, and training.steps is 2: nothing" in run_unchanged(out, *resume)
    (out / "report.html").unlink()  # a kill before it was written
    result = run("pretrain", "--out", out, "--resume")
    assert "nothing is left to train" in " ".join(result.output.split())
    assert (out / "report.html").exists()


@pytest.mark.parametrize("command", ["pretrain", "finetune", "distill"])
def test_a_run_to_resume_that_is_not_there_is_named_beside_those_that_are(
    refuse, tmp_path, command
):
    assert f"no run in '{tmp_path / 'mien'}' to resume" in refuse(
        command, "--out", tmp_path / "mien", "--resume"
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text("{}")
    message = refuse(command, "--out", tmp_path / "mien", "--resume")
    assert "Did you mean 'mine'?" in message
    assert not (tmp_path / "mien").exists()
