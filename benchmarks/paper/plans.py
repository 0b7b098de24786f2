"""The three kinds of runs: a model pre-trained, fine-tuned, or taught by another.

Each plan says what differs from the demo's configuration, recipes/compare.yaml, or tasks.yaml; the
public recipes do the work.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.paper.runs import DivergedError, Figures, Place, Plan, Run, Stop

from switchlm.config import override, read_yaml, to_mapping
from switchlm.data.tasks.mixture import find_task, read_examples, spread_evenly
from switchlm.data.tasks.task import Example
from switchlm.evaluation.metrics import measure
from switchlm.evaluation.tasks import score_task
from switchlm.huggingface.load import load
from switchlm.model import count
from switchlm.recipes.compare import configure
from switchlm.recipes.config import RunConfig, merge_sections, run_config, to_sections
from switchlm.recipes.distill import distill
from switchlm.recipes.distill_config import configure as configure_distillation
from switchlm.recipes.finetune import finetune
from switchlm.recipes.finetune_config import finetune_run, paper_training
from switchlm.recipes.pretrain import pretrain
from switchlm.training.monitor import read_metrics
from switchlm.training.run_folder import RunFolder

HERE = Path(__file__).parent
EVALUATIONS = 20  # of a run
EVALUATE_BATCHES = 16  # 28,000 targets of the demo's text
DENSE_STEP = 0.018  # seconds on one core, as the demo's dense model takes; only for estimates
SPARSE_STEP = 1.35  # times as long


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """A model trained on text: the demo's, but for what is stated here.

    overrides: dotted settings. dense: the twin of equal FLOPs, with the learning rate that is good
    for it. rate: times that learning rate. file: a YAML file beside this one, put over the demo's.
    """

    steps: int
    overrides: tuple[str, ...] = ()
    dense: bool = False
    rate: float = 1.0
    file: str | None = None
    needs: tuple[Plan, ...] = ()

    def resolve(self, seed: int, place: Place) -> RunConfig:
        """Return the configuration; sources may still name {data} and {out}."""
        steps = place.steps(self.steps)
        common = [
            f"training.steps={steps}",
            f"training.seed={seed}",
            f"training.evaluate_every={max(steps // EVALUATIONS, min(steps, 5))}",
            f"training.evaluate_batches={EVALUATE_BATCHES}",
        ]
        pair = configure(
            path=None if self.file is None else HERE / f"{self.file}.yaml",
            overrides=[*common, *(() if self.dense else self.overrides)],
            dense_overrides=self.overrides if self.dense else (),
        )
        run = pair.dense if self.dense else pair.sparse
        rate = run.training.learning_rate * self.rate
        return run_config(run, overrides=[f"training.learning_rate={rate:.6g}"])

    def configuration(self, seed: int, place: Place) -> Figures:
        return to_sections(self.resolve(seed, place))

    def seconds(self, place: Place) -> float:
        run = self.resolve(0, place)
        return run.training.steps * step_seconds(run, run.data.batch_size, run.data.input_length)

    def perform(self, run: Run, out: Path, stop: Stop) -> Figures:
        config = self.resolve(run.seed, run.place)
        sources = [run.place.fill(source) for source in config.data.sources]
        config = run_config(config, sources=sources)
        for _ in pretrain(config, out, resume=True, should_stop=stop):
            pass
        return training_figures(out)


@dataclass(frozen=True, kw_only=True)
class Finetuning:
    """A pre-trained model fine-tuned on a task of tasks.yaml; the best checkpoint is scored.

    The best by the task's metric on validation examples, scored on others. overrides: dotted.
    """

    model: Pretraining
    task: str
    overrides: tuple[str, ...] = ()

    @property
    def needs(self) -> tuple[Plan, ...]:
        return (self.model,)

    def settings(self, seed: int, place: Place) -> Figures:
        """Return the sections `model`, `training` and `finetune`, and how it is scored."""
        scale = read_yaml(HERE / "tasks.yaml")
        own = scale["tasks"][self.task]
        values = merge_sections(to_mapping(scale["common"]), own)
        values = override(values, [*self.overrides, f"training.seed={seed}"])
        training = values["training"]
        training["steps"] = place.steps(training["steps"])
        training["evaluate_every"] = min(training["evaluate_every"], training["steps"])
        return values

    def configuration(self, seed: int, place: Place) -> Figures:
        base = {"task": self.task, "otherwise": to_mapping(paper_training())}
        return {**base, **self.settings(seed, place)}

    def seconds(self, place: Place) -> float:
        values = self.settings(0, place)
        rows, length = (values["finetune"][name] for name in ("batch_size", "input_length"))
        step = step_seconds(self.model.resolve(0, place), rows, length)
        return 2.5 * values["training"]["steps"] * step  # most of it are answers, word by word

    def perform(self, run: Run, out: Path, stop: Stop) -> Figures:
        values = self.settings(run.seed, run.place)
        report = values.pop("report")
        folder = str(run.place.data / report["data"])
        stated = {**values["finetune"], "tasks": (self.task,), "data": folder}
        config = finetune_run(values, stated={**stated, "model": str(run.needs[0].folder)})
        for _ in finetune(config, out, resume=True, should_stop=stop):
            pass
        what, settings = find_task(self.task), config.finetune
        best, tokenizer = load(str(RunFolder(out).model), report=lambda line: None)
        assert tokenizer is not None, "a fine-tuned model has one"
        examples = spread_evenly(read_examples(what, report["split"], folder), report["examples"])
        score = score_task(
            best,
            tokenizer,
            what,
            examples,
            input_length=settings.input_length,
            max_new_tokens=settings.target_length,
            batch_size=settings.batch_size,
        )
        usual = most_frequent(read_examples(what, settings.train_split, folder))
        always = measure(what.metrics, [usual] * len(examples), examples, what.labels)
        metric = what.metrics[0]
        return {
            **training_figures(out),
            "metric": metric,
            "scores": {name: to_mapping(value) for name, value in score.metrics.items()},
            "one_answer": always[metric].value,
            "examples": len(examples),
        }


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """A student of `teacher`, trained as its dense twin `student` is trained alone.

    settings: those of the section `distillation`.
    """

    teacher: Pretraining
    student: Pretraining
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def needs(self) -> tuple[Plan, ...]:
        return (self.teacher,)

    def configuration(self, seed: int, place: Place) -> Figures:
        return {
            "distillation": dict(self.settings),
            "training": to_mapping(self.student.resolve(seed, place).training),
        }

    def seconds(self, place: Place) -> float:
        return 1.6 * self.student.seconds(place)

    def perform(self, run: Run, out: Path, stop: Stop) -> Figures:
        training = self.configuration(run.seed, run.place)["training"]
        config = configure_distillation(
            teacher=str(run.needs[0].folder),
            overrides=[f"training.{name}={json.dumps(value)}" for name, value in training.items()],
            **self.settings,
        )
        for _ in distill(config, out, resume=True, should_stop=stop):
            pass
        return training_figures(out)


def step_seconds(run: RunConfig, rows: int, length: int) -> float:
    """Guess the seconds of a step on one core from its FLOPs, the demo's dense step being known."""
    base = configure().dense
    tokens = rows * length / (base.data.batch_size * base.data.input_length)
    flops = [count.flops_per_token(one.model, 64, 16) for one in (run, base)]
    return DENSE_STEP * tokens * flops[0] / flops[1] * (SPARSE_STEP if run.model.num_experts else 1)


def training_figures(out: Path) -> Figures:
    """Return what a run folder tells of a run of any kind; raise DivergedError."""
    stored = read_yaml(RunFolder(out).config)
    model = run_config(values={name: stored[name] for name in ("model", "router")}).model
    lines = read_metrics(RunFolder(out).metrics)
    trained = [line for line in lines if "loss" in line]
    last = trained[-1]
    if last["loss"] is None:
        raise DivergedError(f"no finite gradient in the last steps up to step {last['step']:,}")
    data = stored.get("data") or {}
    rows = data.get("batch_size") or stored["finetune"]["batch_size"]
    length = data.get("input_length") or stored["finetune"]["input_length"]
    figures = {
        "evaluations": [evaluation(line) for line in lines if "evaluation_loss" in line],
        **{name: last[name] for name in ("step", "tokens", "seconds")},
        "skipped": sum(line["skipped"] for line in trained),
        "dropped": sum(line["dropped"] for line in trained) / len(trained),
        "rows": rows,
        "learning_rate": stored["training"]["learning_rate"],
        "parameters": count.parameters(model),
    }
    if data:  # rows of text are full; those of tasks are not
        targets = max(round(last["tokens"] / last["step"] / rows) - length, 1)
        figures["flops_per_token"] = count.flops_per_token(model, length, targets)
    return figures


def evaluation(line: Mapping[str, Any]) -> Figures:
    """Return what is kept of a line: sources only where there are several."""
    kept = {name: line[name] for name in ("step", "seconds", "evaluation_loss")}
    if len(line.get("evaluation_loss_by_source", ())) > 1:
        by_source = line["evaluation_loss_by_source"]
        kept["evaluation_loss_by_source"] = {name: round(by_source[name], 4) for name in by_source}
    return kept


def most_frequent(examples: Sequence[Example]) -> str:
    """Return the target that a guess without looking would be."""
    counts: dict[str, int] = {}
    for example in examples:
        counts[example.target] = counts.get(example.target, 0) + 1
    return max(counts, key=counts.__getitem__)
