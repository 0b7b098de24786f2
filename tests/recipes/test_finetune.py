import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import ConfigError
from switchlm.evaluation.tasks import score_task
from switchlm.huggingface import load
from switchlm.huggingface.adapters import load_adapters
from switchlm.model import lora
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer
from switchlm.recipes.finetune import beside_baseline, finetune, read_tasks
from switchlm.recipes.finetune_config import finetune_run
from switchlm.training.monitor import read_metrics

TIMES = {"seconds", "tokens_per_second"}
SHORT = (
    "finetune.input_length=16", "finetune.target_length=4", "finetune.batch_size=8",
    "training.steps=12", "training.log_every=4", "training.evaluate_every=4",
    "training.checkpoint_every=4", "training.learning_rate=0.01",
)  # fmt: skip


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A folder with an untrained nano model."""
    folder = tmp_path_factory.mktemp("models") / "nano"
    torch.manual_seed(0)
    load.save(SwitchTransformer(preset("nano")), Tokenizer.bytes(), folder)
    return folder


@pytest.fixture(scope="session")
def task(tmp_path_factory):
    """A task with the first letter of a word as target, in the columns `word` and `first`."""
    path = tmp_path_factory.mktemp("task") / "first.jsonl"
    words = [f"{'ab'[n % 2]}{n}" for n in range(60)]
    lines = [json.dumps({"word": word, "first": word[0]}) for word in words]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def configure(base, task):
    """Build the configuration of a short run."""

    def configure(*overrides, **stated):
        columns = {"template": "say: {word}", "target_column": "first", "metrics": ["accuracy"]}
        usual = {"model": str(base), "tasks": [str(task)], "columns": columns}
        return finetune_run({}, stated=usual | stated, overrides=(*SHORT, *overrides))

    return configure


def run(config, out, **options):
    return [event for event in finetune(config, out, **options) if "step" in event]


def untimed(out):
    lines = read_metrics(out / "metrics.jsonl")
    return [{key: line[key] for key in line.keys() - TIMES} for line in lines]


def files(folder):
    return {path.name: path.is_file() and path.read_bytes() for path in folder.iterdir()}


def test_the_defaults_are_the_papers_settings(base):
    config = finetune_run({}, stated={"model": str(base), "tasks": ["sst2"]})
    assert (config.model.dropout, config.model.expert_dropout) == (0.1, 0.4)
    assert config.model.router.balance == "loss"
    assert config.model.router.balance_weight == 0.01
    training = config.training
    assert (training.schedule, training.warmup_steps) == ("constant", 0)
    assert (training.steps, training.evaluate_every) == (16_000, 200)


def test_settings_can_be_changed_but_not_the_shape(configure):
    config = configure("model.expert_dropout=0.2", "router.balance_weight=0.1")
    assert config.model.expert_dropout == 0.2
    assert config.model.router.balance_weight == 0.1
    with pytest.raises(ConfigError, match=r"model\.d_model is 64, but the model .* has 32"):
        configure("model.d_model=64")


def test_routing_cannot_move_the_switch_layers(configure, tmp_path):
    shape = {"sparse_step": 4, "num_encoder_layers": 4, "num_decoder_layers": 4}
    model = SwitchTransformer(dataclasses.replace(preset("nano"), **shape))
    load.save(model, Tokenizer.bytes(), tmp_path / "four", report=lambda said: None)
    found = configure(model=str(tmp_path / "four")).model.router.mode
    other = "paper" if found == "hf" else "hf"
    with pytest.raises(ConfigError, match="puts Switch layers where the model"):
        configure(f"router.mode={other}", model=str(tmp_path / "four"))


def test_a_run_writes_the_best_model_metrics_and_report(configure, tmp_path):
    out = tmp_path / "run"
    evaluations = [line for line in run(configure(), out) if "score" in line]
    assert [line["step"] for line in evaluations] == [4, 8, 12]
    assert all(line["scores"]["first"].keys() == {"accuracy"} for line in evaluations)
    expected = {"config.yaml", "kernels.json", "metrics.jsonl", "model", "report.html"}
    expected.add("routing.json")
    assert expected <= files(out).keys()
    model, tokenizer = load.load(out)
    assert tokenizer is not None
    assert model.config.num_experts == 4
    best = evaluations[-1]
    report = (out / "report.html").read_text(encoding="utf-8")
    assert f"{best['best_score']:.1f}% at step {best['best_step']}" in report
    assert best["score_without_input"] >= 50, "two labels"
    assert beside_baseline(best) in report
    better = {"best_score": 80.0, "score_without_input": 66.0}
    assert beside_baseline(better).startswith(" Without reading the input, the best constant")
    assert "no better than the 66.0%" in beside_baseline({**better, "best_score": 66.0})


def test_it_learns_and_the_kept_model_has_the_best_score(configure, tmp_path):
    config = configure("training.steps=120", "training.evaluate_every=30", "model.dropout=0")
    evaluations = [line for line in run(config, tmp_path / "run") if "score" in line]
    assert evaluations[-1]["best_score"] == max(line["score"] for line in evaluations) > 60
    model, tokenizer = load.load(tmp_path / "run")
    (task,) = read_tasks(config.finetune).tasks
    examples = read_tasks(config.finetune).validation[task.name]
    found = score_task(model, tokenizer, task, examples, input_length=16, max_new_tokens=4)
    assert found.value == evaluations[-1]["best_score"]


VARIANTS = {
    "all": (),
    "router": ("finetune.trainable=router", "router.balance=bias"),
    "lora": ("finetune.lora_rank=4", "finetune.patience=2"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_equals_an_uninterrupted_one(configure, tmp_path, variant):
    """Bitwise, with best score and model, after a stop and after a crash."""
    config = configure(*VARIANTS[variant], "training.steps=16", "training.checkpoint_every=6")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(config, whole)
    seen: list[dict] = []
    for event in finetune(config, parts, should_stop=lambda: len(seen) > 3):
        seen.append(event)
    for event in finetune(config, parts, resume=True):
        if event.get("step") == 12 and "score" in event:
            break  # dead before the checkpoint of this step
    run(config, parts, resume=True)
    assert untimed(parts) == untimed(whole)
    assert files(parts / "model") == files(whole / "model")


def test_only_routers_differ_where_only_routers_train(configure, base, tmp_path):
    run(configure("finetune.trainable=router"), tmp_path / "run")
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".router." in name}


def test_adapters_alone_and_merged_are_the_same_model(configure, base, tmp_path):
    run(configure("finetune.lora_rank=4", "finetune.lora_alpha=32"), tmp_path / "run")
    merged, _ = load.load(tmp_path / "run")
    model, _ = load.load(base)
    before = model.state_dict()["encoder.blocks.1.feedforward.experts.up"].clone()
    load_adapters(model, tmp_path / "run" / "adapters")
    for name, tensor in lora.merged(model).state_dict().items():
        assert torch.equal(tensor, merged.state_dict()[name]), name
    after = merged.state_dict()["encoder.blocks.1.feedforward.experts.up"]
    assert not torch.equal(after, before)


def test_several_tasks_have_equal_weight(configure, task, tmp_path):
    other = tmp_path / "other.tsv"
    lines = [f"{n}\tx" for n in range(40)]
    other.write_text("word\tfirst\n" + "\n".join(lines), encoding="utf-8")
    config = configure(tasks=[str(task), str(other)])
    lines = run(config, tmp_path / "run")
    evaluations = next(line for line in lines if "score" in line)
    values = [found["accuracy"] for found in evaluations["scores"].values()]
    assert evaluations["scores"].keys() == {"first", "other"}
    assert evaluations["score"] == pytest.approx(sum(values) / 2)


def test_a_named_task_and_your_own_file_are_mixed(configure, tmp_path):
    """`data` is of the named task only."""
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_text("sentence\tlabel\nfine\t1\n")
    own = tmp_path / "own.jsonl"
    own.write_text("\n".join(json.dumps({"input": f"{n}", "target": "x"}) for n in range(40)))
    both = {"tasks": ["sst2", str(own)], "data": str(tmp_path), "columns": {}}
    found = read_tasks(configure(**both).finetune).validation
    assert [one.input for one in found["sst2"]] == ["sst2 sentence: fine"]
    assert {one.target for one in found["own"]} == {"x"}
    with pytest.raises(ConfigError, match="every task is a file itself"):
        read_tasks(configure(**both | {"tasks": [str(own)]}).finetune)


def test_few_examples_to_score_are_from_all_of_the_split(configure, tmp_path):
    """In files sorted by label the first examples have the same label."""
    for split in ("train", "validation"):
        lines = [json.dumps({"word": f"{at}{n}", "first": at}) for at in "ab" for n in range(20)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    config = configure("finetune.evaluation_examples=4", tasks=[str(tmp_path)])
    (chosen,) = read_tasks(config.finetune).validation.values()
    assert [example.input for example in chosen] == ["say: a0", "say: a10", "say: b0", "say: b10"]


def test_a_run_stopped_before_its_first_evaluation_reports_it(configure, tmp_path):
    out = tmp_path / "run"
    lines = run(configure(), out, should_stop=lambda: True)
    assert not lines
    assert not (out / "model").exists()
    assert "before the first evaluation" in (out / "report.html").read_text(encoding="utf-8")
