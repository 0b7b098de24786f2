"""`switchlm finetune` and `distill` on tasks in several processes: the run of one."""

import json

import pytest
import torch
from tests.parallel.processes import run_switchlm

from switchlm.data.text.tokenizer import Tokenizer
from switchlm.huggingface import load
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer

SETTINGS = {
    "finetune.input_length": 16,
    "finetune.target_length": 4,
    "finetune.batch_size": 8,
    "training.steps": 60,
    "training.evaluate_every": 30,
    "training.evaluate_batches": 1,
    "training.learning_rate": 0.01,
    "model.dropout": 0,
    "model.expert_dropout": 0,
    "router.group_rows": 1,
    "router.exploration": "argmax",
    "kernels.switch": "separate",  # not chosen by a trial, so that rounding is the same
}
TASK = "--task=first.jsonl"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with an untrained model, and a task: the first letter of a word."""
    folder = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    load.save(SwitchTransformer(preset("nano")), Tokenizer.bytes(), folder / "nano")
    words = [f"{'ab'[n % 2]}{n}" for n in range(60)]
    lines = [json.dumps({"input": f"say: {word}", "target": word[0]}) for word in words]
    (folder / "first.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def run(home, processes, *arguments):
    settings = [f"--set={name}={value}" for name, value in SETTINGS.items()]
    done = run_switchlm(processes, home, [*arguments, *settings, "--json"])
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def finetune(home, out, processes, *arguments):
    return run(home, processes, "finetune", "--model=nano", TASK, f"--out={out}", *arguments)


@pytest.fixture(scope="module")
def alone(home):
    return finetune(home, "alone", 1)


@pytest.mark.parametrize(
    ("processes", "mesh"),
    [
        pytest.param(2, ["expert=2"]),
        pytest.param(2, ["tensor=2"], marks=pytest.mark.slow),
        pytest.param(4, ["replicas=2", "data=2"], marks=pytest.mark.slow),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else str(value),
)
def test_the_run_is_that_of_one_process(home, alone, processes, mesh):
    out = "-".join(mesh)
    together = finetune(home, out, processes, *(f"--set=mesh.{axis}" for axis in mesh))
    assert [line["step"] for line in together] == [line["step"] for line in alone]
    judged = [[line for line in lines if "score" in line] for lines in (together, alone)]
    assert len(judged[0]) == 2
    for ours, theirs in zip(*judged, strict=True):
        assert ours["evaluation_loss"] == pytest.approx(theirs["evaluation_loss"], rel=1e-3)
        assert ours["score"] == pytest.approx(theirs["score"], abs=20), "one of six answers"
        assert ours["best_step"] == theirs["best_step"]
    whole, parts = (load.load(home / name)[0].state_dict() for name in ("alone", out))
    torch.testing.assert_close(parts, whole, rtol=1e-2, atol=1e-3)
    assert (home / out / "report.html").exists()


def test_parts_of_a_model_are_trained_in_one_process(home):
    done = run_switchlm(2, home, ["finetune", "--model=nano", TASK, "--out=none", "--lora-rank=2"])
    assert done.returncode != 0
    assert "or adapters, are fine-tuned in one process" in done.stderr
    assert not (home / "none").exists()


@pytest.mark.slow
def test_distilling_on_a_task_is_that_of_one_process(home, alone):
    results = []
    for processes in (1, 2):
        mesh = [f"--set=mesh.data={processes}"]
        student = ["--teacher=alone", "--student=dense", f"--out=student-{processes}", *mesh]
        *_, result = run(home, processes, "distill", *student, TASK)
        results.append(result)
    first, second = results
    assert second["student_loss"] == pytest.approx(first["student_loss"], abs=1e-3)
    assert second["student_score"] == first["student_score"]
    assert second["parameters"] == first["parameters"]
