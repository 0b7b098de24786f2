import time

import pytest
import torch

from switchlm.checkpoint.store import CheckpointStore
from switchlm.errors import CheckpointError
from switchlm.model.config import RouterConfig
from switchlm.training import loop
from switchlm.training.config import TrainingConfig
from switchlm.training.loop import train
from switchlm.training.monitor import read_metrics
from switchlm.training.optimizer import build_optimizer
from switchlm.training.run_folder import RunFolder
from switchlm.training.step import training_step

TRAINING_KEYS = {
    "step", "loss", "balance_loss", "z_loss", "dropped", "learning_rate", "gradient_norm", "tokens",
    "tokens_per_second", "seconds", "skipped", "spikes",
}  # fmt: skip
ROUTING_KEYS = {"layers", "load", "gate", "dropped_by_layer"}
EVALUATION_KEYS = {
    "step", "seconds", "evaluation_loss", "evaluation_loss_by_source", "attention_near",
}  # fmt: skip
SWITCH_KEYS = {
    "layers", "gate", "dead_experts", "router_entropy", "load_entropy", "kept_expert",
}  # fmt: skip
CLOCK = {"seconds", "tokens_per_second"}


def timeless(lines: list[dict]) -> list[dict]:
    return [{key: line[key] for key in line.keys() - CLOCK} for line in lines]


def equal_states(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_lines_have_all_documented_keys(build, loader, tmp_path):
    config = TrainingConfig(steps=6, log_every=2, evaluate_every=3, evaluate_batches=2)
    run = RunFolder(tmp_path)
    lines = list(train(build(), loader, config, run=run))
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 6]
    assert read_metrics(run.metrics) == lines
    training = [line for line in lines if "loss" in line]
    assert all(line.keys() == TRAINING_KEYS | ROUTING_KEYS for line in training)
    evaluation = [line for line in lines if "evaluation_loss" in line]
    assert all(line.keys() == EVALUATION_KEYS | SWITCH_KEYS for line in evaluation)
    assert evaluation[0]["kept_expert"] == [None, None]
    assert all(0 < kept <= 1 for kept in evaluation[1]["kept_expert"])
    assert evaluation[0]["layers"] == training[0]["layers"]
    line = training[0]
    assert line["layers"] == ["encoder.blocks.1.feedforward", "decoder.blocks.1.feedforward"]
    assert [len(line[key]) for key in ("load", "gate", "dropped_by_layer")] == [2, 2, 2]
    assert [len(load) for load in line["load"]] == [4, 4]
    tokens = loader.batch(0).num_tokens
    assert [line["tokens"] for line in training] == [2 * tokens, 4 * tokens, 6 * tokens]
    assert evaluation[0]["evaluation_loss_by_source"].keys() == {"up", "down"}


def test_lines_of_dense_models_have_no_routing(build, loader):
    config = TrainingConfig(steps=2, log_every=2, evaluate_every=2, evaluate_batches=1)
    line, evaluation = train(build(num_experts=0), loader, config)
    assert line.keys() == TRAINING_KEYS
    assert evaluation.keys() == EVALUATION_KEYS
    assert line["dropped"] == line["balance_loss"] == 0


def test_it_learns(build, loader):
    config = TrainingConfig(
        steps=120, log_every=30, warmup_steps=20, learning_rate=0.02, evaluate_every=60
    )
    lines = list(train(build(), loader, config))
    losses = [line["loss"] for line in lines if "loss" in line]
    held_out = [line["evaluation_loss"] for line in lines if "evaluation_loss" in line]
    assert losses[-1] < 0.4 * losses[0]
    assert held_out[-1] < held_out[0]


def test_the_real_pipeline_feeds_it(build, text_loader, tmp_path):
    config = TrainingConfig(steps=4, log_every=2, evaluate_every=4, evaluate_batches=4)
    model = build(vocabulary_size=text_loader.tokenizer.vocabulary_size)
    lines = list(train(model, text_loader, config, run=RunFolder(tmp_path)))
    assert lines[-1]["evaluation_loss_by_source"].keys() == {"red", "blue"}


def test_the_loss_of_a_line_is_the_mean_since_the_last(build, loader):
    one = TrainingConfig(steps=8, log_every=1, evaluate_every=None)
    four = TrainingConfig(steps=8, log_every=4, evaluate_every=None)
    each = [line["loss"] for line in train(build(), loader, one)]
    means = [line["loss"] for line in train(build(), loader, four)]
    assert means == pytest.approx([sum(each[:4]) / 4, sum(each[4:]) / 4])


def test_the_last_step_is_always_logged(build, loader):
    config = TrainingConfig(steps=5, log_every=3, evaluate_every=None)
    assert [line["step"] for line in train(build(), loader, config)] == [3, 5]


def test_a_folder_with_a_run_in_it_is_refused(build, loader, tmp_path):
    config = TrainingConfig(steps=1, evaluate_every=None)
    list(train(build(), loader, config, run=RunFolder(tmp_path)))
    with pytest.raises(CheckpointError, match="There are already checkpoints of a run"):
        list(train(build(), loader, config, run=RunFolder(tmp_path)))


def test_accumulation_reads_the_next_batches(build, loader):
    config = TrainingConfig(steps=3, accumulate=2, evaluate_every=None)
    list(train(build(), loader, config))
    assert loader.read == [0, 1, 2, 3, 4, 5]


def test_it_stops_when_time_is_up(build, loader):
    config = TrainingConfig(steps=10**6, seconds=0.3, log_every=1, evaluate_every=None)
    started = time.monotonic()
    *_, line = train(build(), loader, config)
    assert time.monotonic() - started < 20
    assert line["seconds"] >= 0.3


def test_time_outside_is_not_training_time(build, loader):
    config = TrainingConfig(steps=2, log_every=1, evaluate_every=None)
    lines = []
    for line in train(build(), loader, config):
        time.sleep(0.5)
        lines.append(line)
    assert lines[1]["seconds"] - lines[0]["seconds"] < 0.5


def test_a_stop_request_saves_and_evaluates(build, loader, tmp_path):
    seen = []
    config = TrainingConfig(steps=100, log_every=3, evaluate_batches=1)
    run = RunFolder(tmp_path)
    for line in train(build(), loader, config, run=run, should_stop=lambda: len(seen) == 2):
        seen.append(line)
    assert [line["step"] for line in seen] == [3, 6, 6]
    assert "evaluation_loss" in seen[-1]
    assert CheckpointStore(run.checkpoints).steps() == [6]


def test_closing_early_closes_everything(build, loader, tmp_path):
    config = TrainingConfig(steps=100, log_every=1, checkpoint_every=1, evaluate_every=None)
    run = RunFolder(tmp_path)
    lines = train(build(), loader, config, run=run)
    next(lines), next(lines)
    lines.close()
    assert CheckpointStore(run.checkpoints).newest().step == 1
    assert len(read_metrics(run.metrics)) == 2


VARIANTS = {
    "adamw": {},
    "adafactor": {"optimizer": "adafactor"},
    "accumulate": {"accumulate": 2, "schedule": "wsd"},
    "selective": {"precision": "selective"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_is_the_undisturbed_run(build, text_loader, tmp_path, variant):
    """T1, T3: weights, optimizer, data and every line bitwise equal, from mid-interval too."""
    config = TrainingConfig(
        steps=14,
        log_every=4,
        evaluate_every=6,
        evaluate_batches=1,
        checkpoint_every=5,
        warmup_steps=3,
        **VARIANTS[variant],
    )
    shape = {
        "vocabulary_size": text_loader.tokenizer.vocabulary_size,
        "dropout": 0.1,
        "expert_dropout": 0.1,
        "router": RouterConfig(balance="bias"),
    }
    whole, parts = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "parts")
    model = build(**shape)
    lines = list(train(model, text_loader, config, run=whole))

    # The process dies after step 9: the newest checkpoint is of step 5, lines go up to 8.
    for line in train(build(**shape), text_loader, config, run=parts):
        if line["step"] == 8:
            break
    with parts.metrics.open("ab") as file:
        file.write(b'{"step": 9, "los')
    resumed = build(seed=1, **shape)
    list(train(resumed, text_loader, config, run=parts, resume=True))

    assert timeless(read_metrics(parts.metrics)) == timeless(lines)
    assert equal_states(model, resumed)
    one, other = (CheckpointStore(run.checkpoints).load(14) for run in (whole, parts))
    for name, entry in one["optimizer"].items():
        for key, tensor in entry.items():
            assert torch.equal(tensor, other["optimizer"][name][key]), (name, key)


def test_resuming_before_the_first_checkpoint_starts_again(build, loader, tmp_path):
    config = TrainingConfig(steps=3, log_every=1, evaluate_every=None)
    run = RunFolder(tmp_path)
    run.metrics.write_text('{"step": 1, "loss": 5.0}\n', encoding="utf-8")
    list(train(build(), loader, config, run=run, resume=True))
    assert [line["step"] for line in read_metrics(run.metrics)] == [1, 2, 3]


def test_a_resumed_run_passes_its_step_to_the_trackers(build, loader, tmp_path, monkeypatch):
    resumed = []
    opened = loop.open_monitor

    def spy(run, config, resumed_at):
        resumed.append(resumed_at)
        return opened(run, config, resumed_at)

    monkeypatch.setattr(loop, "open_monitor", spy)
    run = RunFolder(tmp_path)
    for steps in (3, 5):
        config = TrainingConfig(steps=steps, evaluate_every=None)
        list(train(build(), loader, config, run=run, resume=steps == 5))
    assert resumed == [None, 3]


def test_resuming_with_another_optimizer_is_refused(build, loader, tmp_path):
    run = RunFolder(tmp_path)
    config = TrainingConfig(steps=1, evaluate_every=None)
    list(train(build(), loader, config, run=run))
    other = TrainingConfig(steps=2, evaluate_every=None, optimizer="adafactor")
    with pytest.raises(CheckpointError, match="does not match"):
        list(train(build(), loader, other, run=run, resume=True))


def test_resuming_needs_a_folder(build, loader):
    with pytest.raises(CheckpointError, match="only be resumed from its folder"):
        list(train(build(), loader, TrainingConfig(), resume=True))


def test_two_runs_may_take_turns(build, loader):
    config = TrainingConfig(steps=6, log_every=2, evaluate_every=None)
    alone = [timeless(list(train(build(num_experts=n), loader, config))) for n in (4, 0)]
    turns = zip(
        train(build(), loader, config), train(build(num_experts=0), loader, config), strict=True
    )
    together = [timeless(list(lines)) for lines in zip(*turns, strict=True)]
    assert together == alone


def test_activation_checkpointing_changes_nothing(build, loader):
    shape = {"dropout": 0.1}
    plain, saving = build(**shape), build(**shape)
    options = {"steps": 3, "evaluate_every": None}
    list(train(plain, loader, TrainingConfig(**options)))
    list(train(saving, loader, TrainingConfig(**options, activation_checkpointing=True)))
    assert equal_states(plain, saving)


@pytest.mark.parametrize("skip_at", [1, 3])
def test_a_skipped_step_is_reported_and_stays_out_of_the_means(build, loader, skip_at):
    """T12 in the loop: a NaN gradient in one step of four."""
    model = build()
    calls = []

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(gradient)
        return gradient * torch.nan if len(calls) == skip_at else gradient

    model.encoder.final_norm.weight.register_hook(spoil)
    config = TrainingConfig(steps=8, log_every=4, evaluate_every=None)
    first, second = train(model, loader, config)
    assert (first["skipped"], second["skipped"]) == (1, 0)
    assert 0 < first["loss"] < 10
    assert 0 < first["gradient_norm"] < 1e3


@pytest.mark.slow
def test_a_compiled_model_trains_equally(build, loader):
    plain, compiled = build(), build()
    options = {"steps": 4, "log_every": 1, "evaluate_every": None}
    expected = [line["loss"] for line in train(plain, loader, TrainingConfig(**options))]
    config = TrainingConfig(**options, compile=True)
    assert [line["loss"] for line in train(compiled, loader, config)] == pytest.approx(
        expected, rel=1e-3
    )
    assert compiled.state_dict().keys() == plain.state_dict().keys()


def test_training_step_is_all_that_a_loop_of_ones_own_needs(build, loader):
    """The step works without the loop, learning rate from the optimizer."""
    model = build()
    optimizer = build_optimizer(model, TrainingConfig())
    for group in optimizer.param_groups:
        group["lr"] = 0.02
    losses = [
        float(training_step(model, optimizer, [loader.batch(step)]).metrics[0])
        for step in range(40)
    ]
    assert losses[-1] < 0.8 * losses[0]
