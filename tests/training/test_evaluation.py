import pytest
import torch
from torch import nn

from switchlm.checkpoint.store import CheckpointStore
from switchlm.training.config import TrainingConfig
from switchlm.training.evaluation import BestCheckpoint, HeldOutLoss
from switchlm.training.loop import train
from switchlm.training.monitor import read_metrics
from switchlm.training.run_folder import RunFolder

CLOCK = {"seconds", "tokens_per_second"}


def small_model():
    model = nn.Linear(1, 1)
    model.precision = "float32"
    return model


MODEL = small_model()


def scripted(*scores, patience=None):
    """An evaluator with the scores of a list, in order."""
    kept = []
    left = dict(enumerate(scores, start=1))
    evaluator = BestCheckpoint(
        score=lambda model: {"score": left.pop(min(left))}, keep=kept.append, patience=patience
    )
    return evaluator, kept


def weight_of(model):
    return float(model.embedding.weight.detach().double().sum())


def judge(patience=None):
    """An evaluator whose scores are a function of the weights, so that they rise and fall."""
    kept = []
    return BestCheckpoint(
        score=lambda model: {"score": round(1e6 * weight_of(model)) % 7},
        keep=lambda model: kept.append(weight_of(model)),
        patience=patience,
    ), kept


def timeless(run):
    return [{key: line[key] for key in line.keys() - CLOCK} for line in read_metrics(run.metrics)]


def test_it_keeps_the_first_of_the_best():
    evaluator, kept = scripted(0.5, 0.7, 0.7, 0.6)
    models = [small_model() for _ in range(4)]
    results = [evaluator.evaluate(model, step) for step, model in enumerate(models)]
    assert kept == models[:2]
    assert evaluator.state() == {"step": 1, "score": 0.7, "misses": 2}
    assert [result.metrics["best_score"] for result in results] == [0.5, 0.7, 0.7, 0.7]
    assert not any(result.stop for result in results)


def test_patience_counts_evaluations_in_a_row():
    evaluator, _ = scripted(0.5, 0.4, 0.6, 0.5, 0.5, 0.5, patience=3)
    assert [evaluator.evaluate(MODEL, step).stop for step in range(6)] == [False] * 5 + [True]


def test_it_goes_on_from_its_state():
    one, _ = scripted(0.5, 0.4, patience=2)
    one.evaluate(MODEL, 1), one.evaluate(MODEL, 2)
    other, kept = scripted(0.4, patience=2)
    other.restore(one.state())
    assert other.evaluate(MODEL, 3).stop
    assert not kept


def test_the_evaluator_can_end_the_run(build, loader, tmp_path):
    evaluator, _ = scripted(1, 2, 1, 1, 3, patience=2)
    config = TrainingConfig(steps=100, log_every=100, evaluate_every=3, checkpoint_every=None)
    run = RunFolder(tmp_path)
    lines = list(train(build(), loader, config, run=run, evaluator=evaluator))
    assert [(line["step"], line["score"]) for line in lines] == [(3, 1), (6, 2), (9, 1), (12, 1)]
    assert lines[-1]["best_step"] == 6
    assert CheckpointStore(run.checkpoints).steps() == [12]

    again, _ = scripted(patience=2)
    assert not list(train(build(), loader, config, run=run, resume=True, evaluator=again))
    assert again.state() == evaluator.state()


def test_the_last_step_is_always_evaluated_and_in_its_checkpoint(build, loader, tmp_path):
    evaluator, _ = scripted(1, 2, 3)
    config = TrainingConfig(steps=5, log_every=5, evaluate_every=2, checkpoint_every=5)
    run = RunFolder(tmp_path)
    lines = list(train(build(), loader, config, run=run, evaluator=evaluator))
    assert [line["step"] for line in lines if "score" in line] == [2, 4, 5]
    assert CheckpointStore(run.checkpoints).load()["progress"]["evaluator"]["score"] == 3


@pytest.mark.parametrize("kill_after", [6, 10, 14])
def test_a_resumed_run_stops_as_an_uninterrupted_one(build, loader, tmp_path, kill_after):
    options = {"log_every": 1, "evaluate_every": 3, "checkpoint_every": 5, "warmup_steps": 0}
    config = TrainingConfig(steps=40, **options)
    whole, parts = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "parts")
    evaluator, kept = judge(patience=4)
    list(train(build(), loader, config, run=whole, evaluator=evaluator))

    for line in train(build(), loader, config, run=parts, evaluator=judge(patience=4)[0]):
        if line["step"] == kill_after:
            break
    resumed, kept_later = judge(patience=4)
    model = build(seed=1)
    list(train(model, loader, config, run=parts, resume=True, evaluator=resumed))
    assert timeless(parts) == timeless(whole)
    assert resumed.state() == evaluator.state()
    assert kept_later == kept[len(kept) - len(kept_later) :]


def test_a_run_that_is_stopped_has_no_extra_evaluation(build, loader, tmp_path):
    """Otherwise the resumed run would have one evaluation more than an uninterrupted one."""
    config = TrainingConfig(steps=9, log_every=1, evaluate_every=3)
    whole, parts = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "parts")
    list(train(build(), loader, config, run=whole, evaluator=judge()[0]))
    seen = []
    options = {"run": parts, "evaluator": judge()[0], "should_stop": lambda: len(seen) >= 5}
    for line in train(build(), loader, config, **options):
        seen.append(line)
    assert seen[-1]["step"] == 4
    assert CheckpointStore(parts.checkpoints).steps() == [4]
    list(train(build(), loader, config, run=parts, resume=True, evaluator=judge()[0]))
    assert timeless(parts) == timeless(whole)


def test_checkpoints_hold_what_trains(build, loader, tmp_path):
    """A frozen parameter of a resumed run is that of the given model."""
    config = TrainingConfig(steps=2, evaluate_every=None)
    run = RunFolder(tmp_path)
    model = build()
    model.embedding.weight.requires_grad_(False)
    before = model.embedding.weight.clone()
    list(train(model, loader, config, run=run))
    saved = CheckpointStore(run.checkpoints).load()
    assert saved["model"].keys() == model.state_dict().keys() - {"embedding.weight"}
    assert "embedding.weight" not in saved["optimizer"]
    assert model.embedding.weight.grad is None
    assert torch.equal(model.embedding.weight, before)


@pytest.mark.parametrize("stop_after", [6, 10, 14])
def test_a_resumed_run_knows_the_experts_of_the_evaluation_before(
    build, loader, tmp_path, stop_after
):
    """Killed after an evaluation that is in the checkpoint, and after one that is not."""
    config = TrainingConfig(
        steps=15,
        log_every=1,
        evaluate_every=3,
        evaluate_batches=1,
        checkpoint_every=5,
        warmup_steps=0,
        learning_rate=0.02,
    )
    whole, parts = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "parts")
    list(train(build(), loader, config, run=whole))
    for line in train(build(), loader, config, run=parts):
        if line["step"] == stop_after:
            break
    list(train(build(seed=1), loader, config, run=parts, resume=True))
    assert timeless(parts) == timeless(whole)
    kept = [line["kept_expert"] for line in timeless(whole) if "kept_expert" in line]
    assert kept[0] == [None, None]
    assert len({tuple(part) for part in kept[1:]}) > 1, "experts that never move test nothing"


def test_an_evaluation_out_of_turn_is_not_remembered(build, loader, tmp_path):
    """The extra evaluation of a stopped run writes a line, and does not change later lines."""
    config = TrainingConfig(
        steps=9, log_every=1, evaluate_every=3, evaluate_batches=1, learning_rate=0.02
    )
    whole, parts = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "parts")
    list(train(build(), loader, config, run=whole))
    seen = []
    for line in train(build(), loader, config, run=parts, should_stop=lambda: len(seen) >= 5):
        seen.append(line)
    assert (seen[-1]["step"], "kept_expert" in seen[-1]) == (4, True)
    list(train(build(), loader, config, run=parts, resume=True))
    lines = timeless(parts)
    lines.remove({key: seen[-1][key] for key in seen[-1].keys() - CLOCK})
    assert lines == timeless(whole)


def test_what_it_measures_changes_nothing_in_training(build, loader):
    config = TrainingConfig(steps=6, log_every=1, evaluate_every=2, evaluate_batches=1)
    without = TrainingConfig(steps=6, log_every=1, evaluate_every=None)
    shape = {"dropout": 0.1, "expert_dropout": 0.1}
    lines = [line for line in train(build(**shape), loader, config) if "loss" in line]
    expected = list(train(build(**shape), loader, without))
    assert [line["loss"] for line in lines] == [line["loss"] for line in expected]


def test_other_held_out_text_is_not_compared(build, loader):
    """As after a resume with other settings of the data."""
    model = build()
    one = HeldOutLoss(loader.held_out(1), loader.sources)
    one.evaluate(model, 1)
    assert one.evaluate(model, 2).metrics["kept_expert"] == [1.0, 1.0]
    loader.rows = 4
    other = HeldOutLoss(loader.held_out(1), loader.sources)
    other.restore(one.state())
    assert other.evaluate(model, 3).metrics["kept_expert"] == [None, None]
