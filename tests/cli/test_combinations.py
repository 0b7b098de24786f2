"""Every precision on every kind of mesh with every command that it can meet, one short run each.

A run must end with a finite held-out loss that is the single process's, and its saved model must
load and have that loss. Combinations that cannot exist are refused by a sentence that says why.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parallel.processes import run_switchlm

from switchlm.huggingface.load import load

PRECISIONS = ("float32", "selective", "bfloat16")
MESHES = {
    "one": 1,
    "data=2": 2,
    "expert=2": 2,
    "tensor=2": 2,
    "replicas=2": 2,
    "data=2 expert=2": 4,
    "expert=2 tensor=2": 4,
    "replicas=2 data=2": 4,
    "data=2 tensor=2": 4,
}
FAST = {
    ("pretrain", "selective", "expert=2"),
    ("pretrain", "bfloat16", "data=2"),
    ("distill", "selective", "data=2"),
}
# Relative differences of held-out losses: sums in another order, and numbers of 8 bits.
TOLERANCE = {"float32": 1e-4, "selective": 2e-3, "bfloat16": 2e-3}
SETTINGS = {
    "training.steps": 4,
    "training.log_every": 2,
    "training.evaluate_every": 2,
    "training.evaluate_batches": 1,
    "training.checkpoint_every": 2,
    "training.learning_rate": 0.003,
    "router.group_rows": 1,
    "router.exploration": "argmax",
}
ROWS = {
    "data.tokenizer": "bytes",
    "data.batch_size": 4,
    "data.input_length": 32,
    "data.held_out_share": 0.1,
}
PAIRS = {
    "finetune.input_length": 16,
    "finetune.target_length": 4,
    "finetune.batch_size": 4,
    "model.dropout": 0,
    "model.expert_dropout": 0,
}


def cells(command: str) -> list[Any]:
    return [
        pytest.param(
            precision,
            mesh,
            marks=() if (command, precision, mesh) in FAST else pytest.mark.slow,
        )
        for precision in PRECISIONS
        for mesh in MESHES
    ]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with text, and a task: the first letter of a word."""
    folder = tmp_path_factory.mktemp("home")
    for number in range(12):
        words = " ".join(f"{number} and {other} are {number * other};" for other in range(60))
        (folder / f"{number}.txt").write_text(words, encoding="utf-8")
    words = [f"{'ab'[n % 2]}{n}" for n in range(40)]
    lines = [json.dumps({"input": f"say: {word}", "target": word[0]}) for word in words]
    (folder / "first.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def switchlm(home: Path, processes: int, *arguments: str) -> str:
    done = run_switchlm(processes, home, arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def options(settings: dict[str, Any], precision: str, mesh: str) -> list[str]:
    axes = [] if mesh == "one" else [f"mesh.{axis}" for axis in mesh.split()]
    stated = [f"{name}={value}" for name, value in settings.items()]
    return [f"--set={one}" for one in (*stated, f"training.precision={precision}", *axes)]


def pretrain(home: Path, precision: str, mesh: str, steps: int = 4, *more: str) -> Path:
    """Pre-train, unless that run exists already."""
    name = f"pretrain {precision} {mesh} {' '.join(more)}".strip()
    if not (home / name / "model").exists() or steps > 4:
        settings = {**SETTINGS, **ROWS, "training.steps": steps}
        start = ["pretrain", "--preset=nano", "--data=*.txt", f"--out={name}", *more]
        resume = ["--resume"] if steps > 4 else []
        switchlm(home, MESHES[mesh], *start, *resume, *options(settings, precision, mesh))
    return home / name


def held_out(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["evaluation_loss"] for line in lines if "evaluation_loss" in line]


def evaluate(home: Path, model: Path, *arguments: str) -> float:
    found = switchlm(home, 1, "evaluate", f"--model={model}", "--batches=1", "--json", *arguments)
    return float(json.loads(found)["loss"])


@pytest.mark.parametrize(("precision", "mesh"), cells("pretrain"))
def test_pretrain(home, precision, mesh):
    run = pretrain(home, precision, mesh)
    losses, alone = held_out(run), held_out(pretrain(home, "float32", "one"))
    assert len(losses) == len(alone) == 2
    assert losses == pytest.approx(alone, rel=TOLERANCE[precision])
    assert losses[1] < losses[0]
    assert evaluate(home, run) == pytest.approx(losses[-1], rel=TOLERANCE[precision])
    records = json.loads((run / "routing.json").read_text())
    assert len(records) == 2
    assert all(math.isfinite(record["gate"]) and sum(record["load_E"]) for record in records)
    assert (run / "report.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_resume(home, precision, mesh):
    """It goes on as the single process does, from a checkpoint of its own mesh."""
    run, alone = (pretrain(home, precision, which) for which in (mesh, "one"))
    pretrain(home, precision, mesh, steps=6)
    if len(held_out(alone)) == 2:
        pretrain(home, precision, "one", steps=6)
    assert held_out(run) == pytest.approx(held_out(alone), rel=TOLERANCE[precision])
    assert evaluate(home, run) == pytest.approx(held_out(run)[-1], rel=TOLERANCE[precision])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_pretrain_of_a_dense_model(home, precision, mesh):
    dense = ["--set=model.num_experts=0"]
    run, alone = (
        pretrain(home, precision, mesh, 4, *dense),
        pretrain(home, "float32", "one", 4, *dense),
    )
    assert held_out(run) == pytest.approx(held_out(alone), rel=TOLERANCE[precision])
    assert evaluate(home, run) == pytest.approx(held_out(run)[-1], rel=TOLERANCE[precision])


@pytest.mark.parametrize(("precision", "mesh"), cells("distill"))
def test_distill(home, precision, mesh):
    teacher = pretrain(home, "float32", "one")
    name = f"distill {precision} {mesh}"
    settings = {**SETTINGS, **ROWS, "training.steps": 2}
    start = ["distill", f"--teacher={teacher.name}", "--data=*.txt", f"--out={name}", "--json"]
    out = switchlm(
        home, MESHES[mesh], *start, "--student=nano", *options(settings, precision, mesh)
    )
    found = json.loads(out)
    [last] = held_out(home / name)
    assert found["teacher_loss"] == pytest.approx(held_out(teacher)[-1], rel=1e-5)
    assert found["student_loss"] == pytest.approx(last, rel=TOLERANCE[precision])
    assert found["student_loss"] == pytest.approx(evaluate(home, home / name), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [mesh for mesh in MESHES if mesh != "one"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_finetune(home, precision, mesh):
    model = pretrain(home, "float32", "one")
    losses = []
    for which in ("one", mesh):
        name = f"finetune {precision} {mesh} {which}"
        start = ["finetune", f"--model={model.name}", "--task=first.jsonl", f"--out={name}"]
        switchlm(home, MESHES[which], *start, *options({**SETTINGS, **PAIRS}, precision, which))
        more = options({**SETTINGS, **PAIRS, "training.steps": 6}, precision, which)
        switchlm(home, MESHES[which], *start, "--resume", *more)
        losses.append(held_out(home / name))
        best, _ = load(home / name)
        assert all(tensor.isfinite().all() for tensor in best.state_dict().values())
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=5 * TOLERANCE[precision])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["one", "data=2 expert=2"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_done_with_a_model(home, precision, mesh):
    """Evaluated, asked, converted, compressed and exported, whatever it was trained by."""
    run = pretrain(home, precision, mesh)
    loss = evaluate(home, run)
    assert switchlm(home, 1, "generate", f"--model={run}", "3 and <extra_id_0>", "--greedy")
    text = ["--data=*.txt", "--batches=1", "--batch-size=4", "--input-length=32"]
    for dtype, tolerance in (("float32", 1e-6), ("bfloat16", 0.02), ("float16", 0.002)):
        out = home / f"{run.name} {dtype}"
        convert = ["convert", f"--model={run}", f"--out={out}", "--to=native", f"--dtype={dtype}"]
        switchlm(home, 1, *convert)
        model, _ = load(out)
        assert model.embedding.weight.dtype == getattr(torch, dtype)
        assert evaluate(home, out, *text[::2], *text[2:]) == pytest.approx(
            evaluate(home, run, *text[::2], *text[2:]), rel=tolerance
        )
    for number, how in enumerate((["--bits=8"], ["--bits=4"], ["--keep-experts=2"])):
        out = home / f"{run.name} smaller {number}"
        found = switchlm(
            home, 1, "compress", f"--model={run}", f"--out={out}", *how, *text, "--json"
        )
        assert json.loads(found)
        assert evaluate(home, out, *text[::2], *text[2:]) == pytest.approx(loss, rel=0.2)
    out = home / f"{run.name} exported"
    switchlm(home, 1, "export", f"--model={run}", "--to=torch", f"--out={out}", "--check=3 and")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--set=mesh.tensor=2", "--set=model.num_heads=1"], "num_heads 1 cannot be split evenly"),
        (["--set=training.precision=float16"], "training.precision is 'float16'"),
    ],
)
def test_what_cannot_exist_is_refused(home, arguments, why):
    start = ["pretrain", "--preset=nano", "--data=*.txt", "--out=refused", "--set=training.steps=1"]
    done = run_switchlm(2, home, [*start, *arguments])
    assert done.returncode == 2
    assert why in done.stderr
