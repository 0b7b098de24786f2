"""Distillation from start to end: the result, students of every kind, caches, resuming."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch

from switchlm.huggingface.load import load, load_config
from switchlm.model.presets import preset
from switchlm.recipes.config import run_config
from switchlm.recipes.distill import distill, headline, share_kept
from switchlm.recipes.distill_config import configure, resumed
from switchlm.recipes.finetune import finetune
from switchlm.recipes.finetune_config import finetune_run
from switchlm.recipes.pretrain import pretrain
from switchlm.training.distillation import Teacher

SHORT = [
    "training.steps=12", "training.log_every=3", "training.evaluate_every=6",
    "training.evaluate_batches=2", "training.checkpoint_every=4", "training.warmup_steps=0",
]  # fmt: skip
UNTIMED = ("seconds", "tokens_per_second")


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    """A home folder for the token cache."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        patch.setenv("HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def text(home):
    draw = random.Random(0)
    words = ["route", "every", "token", "to", "one", "expert", "and", "keep", "the", "load", "even"]
    (home / "text").mkdir()
    for document in range(40):
        lines = [" ".join(draw.choices(words, k=12)) for _ in range(12)]
        (home / "text" / f"{document}.txt").write_text("\n".join(lines), encoding="utf-8")
    return str(home / "text")


@pytest.fixture(scope="module")
def models(home, text):
    """Runs of a teacher, and of its dense twin."""
    for name in ("nano", "dense-nano"):
        rows = ["data.batch_size=4", "data.input_length=48", "data.held_out_share=0.1"]
        config = run_config(preset=name, sources=[text], overrides=[*SHORT, *rows])
        list(pretrain(config, home / name))
    return home


@pytest.fixture(scope="module")
def teacher(models):
    return str(models / "nano")


def run(config, out: Path, **options):
    """Distil and return (result, metrics lines)."""
    events = list(distill(config, out, **options))
    return events[-1]["result"], [event for event in events if "step" in event]


def untimed(out: Path) -> list[dict]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in UNTIMED} for line in lines]


def weights(out: Path) -> bytes:
    return (out / "model" / "model.safetensors").read_bytes()


def test_the_result_is_what_the_paper_reports(tmp_path, models, teacher):
    dense = str(models / "dense-nano")
    config = configure(teacher=teacher, baseline=dense, overrides=SHORT)
    result, lines = run(config, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "distill.json").read_text()) == result
    assert result["steps"] == 12
    losses = {}
    for name in ("nano", "dense-nano"):
        metrics = (models / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = json.loads(metrics[-1])["evaluation_loss"]
    assert result["teacher_loss"] == pytest.approx(losses["nano"], rel=1e-5)
    assert result["baseline_loss"] == pytest.approx(losses["dense-nano"], rel=1e-5)
    assert result["student_loss"] == lines[-1]["evaluation_loss"]
    sizes = result["parameters"]
    assert result["compression"] == 1 - sizes["student"] / sizes["teacher"]
    assert result["configuration"]["model"]["num_experts"] == 0
    assert load_config(tmp_path / "run") == dataclasses.replace(
        load_config(teacher).dense_twin(), dropout=0.0
    )
    assert headline(result) in (tmp_path / "run" / "report.html").read_text()


def test_quality_kept_as_in_table_6():
    """With losses of Table 6, and scores of Table 8."""
    kept = {quality: share_kept(quality, -1.444, -1.636) for quality in (-1.631, -1.598, -1.580)}
    assert {key: round(value, 2) for key, value in kept.items()} == {
        -1.631: 0.03, -1.598: 0.20, -1.580: 0.29,
    }  # fmt: skip
    assert round(share_kept(76.6, teacher=81.3, baseline=74.6), 2) == 0.30
    assert share_kept(1.5, teacher=1.6, baseline=1.6) is None


def test_the_headline_depends_on_the_result():
    result = {
        "student_loss": 1.58, "teacher_loss": 1.444, "baseline_loss": 1.636, "quality_kept": 0.29,
        "compression": 0.94, "parameters": {"student": 223, "teacher": 3800}, "quality": "loss",
    }  # fmt: skip
    assert headline(result).startswith("Quality kept: 29% of the teacher's gain")
    assert "compression 94% (223 of 3,800 parameters)" in headline(result)
    assert "Quality" not in headline({**result, "baseline_loss": None})
    assert "no better" in headline({**result, "quality_kept": None})
    scores = {"student_score": 76.6, "teacher_score": 81.3, "baseline_score": 74.6}
    assert "dense baseline 74.60%" in headline({**result, **scores, "quality": "score"})


def test_a_student_starts_from_the_teacher(tmp_path, teacher):
    """With a learning rate near zero it keeps its initial weights."""
    still = [*SHORT, "training.learning_rate=1e-12"]
    config = configure(teacher=teacher, feedforward="most_used", overrides=still)
    run(config, tmp_path / "start")
    theirs, _ = load(teacher)
    mine, _ = load(tmp_path / "start")
    assert torch.allclose(mine.embedding.weight, theirs.embedding.weight, atol=1e-9)
    up = mine.encoder.blocks[1].feedforward.up.weight.t()
    experts = theirs.encoder.blocks[1].feedforward.experts.up
    assert any(torch.allclose(up, expert, atol=1e-9) for expert in experts)


def test_students_of_every_kind(tmp_path, models, teacher):
    smaller = configure(
        teacher=teacher, student="nano", overrides=[*SHORT, "model.num_experts=2"],
        feedforward="most_used",
    )  # fmt: skip
    result, _ = run(smaller, tmp_path / "smaller")
    assert load_config(tmp_path / "smaller").num_experts == 2
    assert 0 < result["compression"] < 1
    other = configure(teacher=teacher, student="dense-tiny", overrides=SHORT, start="random")
    run(other, tmp_path / "other")
    assert load_config(tmp_path / "other").d_ff == preset("tiny").d_ff
    still = [*SHORT, "training.learning_rate=1e-12"]
    own = configure(teacher=teacher, student=str(models / "dense-nano"), overrides=still)
    run(own, tmp_path / "own")
    mine, theirs = load(tmp_path / "own")[0], load(models / "dense-nano")[0]
    assert torch.allclose(mine.embedding.weight, theirs.embedding.weight, atol=1e-9)


def test_the_control_runs_no_teacher(tmp_path, teacher, monkeypatch):
    monkeypatch.setattr(Teacher, "__call__", raise_on_call)
    control = configure(teacher=teacher, soft_weight=0.0, hard_weight=1.0, overrides=SHORT)
    run(control, tmp_path / "control")


def raise_on_call(*_arguments):
    raise AssertionError("the teacher was called")


def test_a_cache_of_all_tokens_trains_the_same_student_and_the_second_run_no_teacher(
    tmp_path, teacher, monkeypatch
):
    run(configure(teacher=teacher, overrides=SHORT), tmp_path / "online")
    size = load_config(teacher).vocabulary_size
    cached = configure(
        teacher=teacher, cache_logits=str(tmp_path / "logits"), top_k=size, overrides=SHORT
    )
    run(cached, tmp_path / "first")
    monkeypatch.setattr(Teacher, "__call__", raise_on_call)
    run(cached, tmp_path / "second")
    assert untimed(tmp_path / "first") == untimed(tmp_path / "second")
    assert weights(tmp_path / "first") == weights(tmp_path / "second")
    online, cached = (
        [line["loss"] for line in untimed(tmp_path / name) if "loss" in line]
        for name in ("online", "first")
    )
    assert online == pytest.approx(cached, rel=1e-4)


@pytest.mark.parametrize("cached", [False, True])
def test_a_killed_and_stopped_run_ends_bitwise_as_an_uninterrupted_one(tmp_path, teacher, cached):
    settings = {"cache_logits": str(tmp_path / "logits"), "top_k": 8} if cached else {}
    config = configure(teacher=teacher, overrides=SHORT, **settings)
    run(config, tmp_path / "whole")
    out = tmp_path / "broken"
    died = distill(config, out)
    for event in died:
        if event.get("step") == 6:
            break  # after the checkpoint of step 4, and none since
    died.close()
    seen: list[int] = []
    for event in distill(resumed(out), out, resume=True, should_stop=lambda: 9 in seen):
        seen.append(event.get("step", 0))
    result, _ = run(resumed(out), out, resume=True)
    expected = json.loads((tmp_path / "whole" / "distill.json").read_text())
    for each in (result, expected):
        del each["seconds"]
    assert result == expected
    assert weights(out) == weights(tmp_path / "whole")
    trained = [line for line in untimed(out) if "loss" in line]
    assert trained == [line for line in untimed(tmp_path / "whole") if "loss" in line]


@pytest.fixture(scope="module")
def tuned(home, models):
    """A fine-tuned teacher; its task is to repeat the last word."""
    draw = random.Random(1)
    lines = []
    for number in range(60):
        first, second = draw.choices(["left", "right"], k=2)
        lines.append(json.dumps({"input": f"{number} {first} {second}", "target": second}))
    (home / "last.jsonl").write_text("\n".join(lines), encoding="utf-8")
    stated = {"model": str(models / "nano"), "tasks": [str(home / "last.jsonl")]}
    rows = ["finetune.input_length=24", "finetune.target_length=8", "finetune.batch_size=8"]
    run = finetune_run({}, stated=stated, overrides=[*SHORT, *rows])
    list(finetune(run, home / "tuned"))
    return home / "tuned"


def test_a_run_stopped_while_its_cache_is_built_leaves_nothing(tmp_path, teacher):
    cache = tmp_path / "logits"
    config = configure(teacher=teacher, cache_logits=str(cache), overrides=SHORT)
    events = list(distill(config, tmp_path / "run", should_stop=lambda: True))
    assert all("phase" in event for event in events)
    assert not cache.exists()
    assert not (tmp_path / "run").exists()


def test_a_fine_tuned_teacher_teaches_its_task(tmp_path, models, tuned):
    config = configure(
        teacher=str(tuned),
        baseline=str(models / "dense-nano"),
        overrides=[*SHORT, "finetune.evaluation_examples=4"],
    )
    assert config.finetune is not None
    assert config.finetune.input_length == 24
    result, lines = run(config, tmp_path / "run")
    assert result["quality"] == "score"
    for role in ("student", "teacher", "baseline"):
        assert 0 <= result[f"{role}_score"] <= 100
        assert set(result["scores"][role]) == {"last"}
    assert result["student_loss"] == pytest.approx(lines[-1]["evaluation_loss"])
    again, _ = run(resumed(tmp_path / "run"), tmp_path / "run", resume=True)
    assert again == result


def test_another_teacher_teaches_a_task_by_name_or_file(tmp_path, teacher, tuned):
    lengths = ["finetune.input_length=24", "finetune.target_length=8", "finetune.batch_size=8"]
    config = configure(
        teacher=teacher,
        tasks=[str(tuned.parent / "last.jsonl")],
        overrides=[*SHORT, *lengths, "finetune.evaluation_examples=4"],
        cache_logits=str(tmp_path / "logits"),
        baseline="7.5",
    )
    result, _ = run(config, tmp_path / "run")
    assert result["quality"] == "loss"
    assert "student_score" in result
    text = configure(teacher=str(tuned), sources=["text.txt"], overrides=SHORT)
    assert text.finetune is None
    assert text.run.data.sources == ("text.txt",)
