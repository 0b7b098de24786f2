"""The parts of study.py: what is run for one seed, and the figures that each part ends in."""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
from switchlm.checkpoint.files import replace_file
from switchlm.checkpoint.huggingface import load
from switchlm.checkpoint.run_folder import RunFolder
from switchlm.config import read_yaml, to_mapping
from switchlm.data.task import Example
from switchlm.data.tasks import find_task, read_examples, spread_evenly
from switchlm.evaluation.metrics import measure
from switchlm.evaluation.tasks import score_task
from switchlm.model import count
from switchlm.parallel.launch import launched
from switchlm.recipes.config import RunConfig, put_over, run_config
from switchlm.recipes.distill import distill
from switchlm.recipes.distill_config import configure
from switchlm.recipes.finetune import finetune
from switchlm.recipes.finetune_config import finetune_run
from switchlm.recipes.pretrain import default_device, pretrain
from switchlm.training.monitor import read_metrics

MODELS = ("dense", "sparse")
# Table 6, in its order. A student trains as long as the dense baseline did.
ROWS: dict[str, dict[str, Any]] = {
    "only": {"start": "random", "hard_weight": 0.0, "soft_weight": 1.0},
    "weights": {"hard_weight": 0.0, "soft_weight": 1.0},
    "mixed": {"hard_weight": 0.75, "soft_weight": 0.25},
    "control": {"hard_weight": 1.0, "soft_weight": 0.0},
}


@dataclass(frozen=True, kw_only=True)
class Study:
    """What all parts of one seed have in common.

    scale: study/SCALE.yaml as it stands. data: the folder of the text and the tasks, where they are
    not read from the hub. out: the folder of the seed.
    """

    scale: Mapping[str, Any]
    data: Path
    out: Path
    seed: int

    def run_config(self, model: str) -> RunConfig:
        """Return how `sparse` or `dense` is pre-trained."""
        stated = dict(self.scale["pretrain"])
        sources = stated.pop("sources", None) or [str(self.data / "english_novels")]
        config = run_config(
            values=stated, sources=sources, overrides=[f"training.seed={self.seed}"]
        )
        if model == "sparse":
            return config
        twin = to_mapping(config.model.dense_twin())
        router = twin.pop("router")
        values = put_over({"model": twin, "router": router}, self.scale.get("dense", {}))
        return run_config(config, values=values)

    def place(self, task: str) -> str | None:
        """Return where the examples of a task are; None is the hub."""
        named = self.scale["tasks"][task].get("data")
        return None if named is None else str(self.data / named)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A run of the study: `perform(study, out, *arguments)` returns its figures."""

    name: str
    perform: Callable[..., dict[str, Any]]
    study: Study
    arguments: tuple[str, ...] = ()
    needs: tuple[str, ...] = field(default=())

    @property
    def result(self) -> Path:
        """The file of its figures; there once it is finished."""
        return self.study.out / f"{self.name}.json"

    @property
    def needed(self) -> set[Path]:
        """The results that must be there before it runs."""
        return {self.study.out / f"{need}.json" for need in self.needs}

    def run(self) -> str:
        """Do it, from where it was stopped if it was, and write its figures; return its name."""
        figures = self.perform(self.study, self.study.out / self.name, *self.arguments)
        figures["environment"] = harness.environment(self.study.seed)
        if is_main_process():
            replace_file(self.result, (json.dumps(figures, indent=1) + "\n").encode())
        return f"{self.study.out.name} {self.name}"


def is_main_process() -> bool:
    """Whether this process is alone, or the one of a job that writes results."""
    launch = launched()
    return launch is None or launch.rank == 0


def in_order(studies: Sequence[Study]) -> Iterator[Part]:
    """Yield all parts, each after what it needs: a stopped study has all seeds of what it has.

    The two of a pair come one after the other, so that two workers train them side by side.
    """
    for study in studies:
        study.out.mkdir(parents=True, exist_ok=True)
        for model in MODELS:
            yield Part(
                name=f"pretrain-{model}", perform=pretrained, study=study, arguments=(model,)
            )
    for task, study, model in itertools.product(studies[0].scale["tasks"], studies, MODELS):
        yield Part(
            name=f"finetune-{task}-{model}",
            perform=finetuned,
            study=study,
            arguments=(task, model),
            needs=(f"pretrain-{model}",),
        )
    for row, study in itertools.product(ROWS, studies):
        yield Part(
            name=f"distill-{row}",
            perform=distilled,
            study=study,
            arguments=(row,),
            needs=("pretrain-dense", "pretrain-sparse"),
        )


def pretrained(study: Study, out: Path, model: str) -> dict[str, Any]:
    """Pre-train one of the pair."""
    for _ in pretrain(study.run_config(model), out, resume=True):
        pass
    config = run_config(values=read_yaml(RunFolder(out).config))
    lines = read_metrics(RunFolder(out).metrics)
    last = [line for line in lines if "loss" in line][-1]
    inputs = config.data.input_length
    return {
        "evaluations": [line for line in lines if "evaluation_loss" in line],
        "dropped": last["dropped"],
        **{name: last[name] for name in ("step", "tokens", "seconds")},
        "learning_rate": config.training.learning_rate,
        "parameters": count.parameters(config.model),
        # The paper counts a sequence; spans of three make about a quarter as many targets.
        "flops_per_token": count.flops_per_token(config.model, inputs, max(inputs // 4, 1)),
    }


def finetuned(study: Study, out: Path, task: str, model: str) -> dict[str, Any]:
    """Fine-tune one of the pair on a task, and score the best checkpoint on other examples."""
    scale, own = study.scale, study.scale["tasks"][task]
    values = {
        name: {**scale["finetune"].get(name, {}), **own.get(name, {})}
        for name in ("model", "training", "finetune")
    }
    base = study.out / f"pretrain-{model}"
    config = finetune_run(
        values,
        stated={
            **values["finetune"],
            "model": str(base),
            "tasks": (task,),
            "data": study.place(task),
        },
        overrides=[f"training.seed={study.seed}"],
    )
    evaluations = [line for line in finetune(config, out, resume=True) if "best_step" in line] or [
        line for line in read_metrics(RunFolder(out).metrics) if "best_step" in line
    ]
    what, settings = find_task(task), config.finetune
    examples = spread_evenly(
        read_examples(what, own["report_split"], study.place(task)),
        own.get("report_examples", scale["report_examples"]),
    )
    best, tokenizer = load(str(RunFolder(out).model), device=default_device())
    assert tokenizer is not None, "a fine-tuned model has one"
    score = score_task(
        best,
        tokenizer,
        what,
        examples,
        input_length=settings.input_length,
        max_new_tokens=settings.target_length,
        batch_size=settings.batch_size,
    )
    usual = most_frequent(read_examples(what, settings.train_split, study.place(task)))
    always = measure(what.metrics, [usual] * len(examples), examples, what.labels)
    metric = what.metrics[0]
    return {
        "metric": metric,
        "scores": {name: to_mapping(value) for name, value in score.metrics.items()},
        "always_the_same": to_mapping(always[metric]),
        "examples": len(examples),
        "split": own["report_split"],
        "best_step": evaluations[-1]["best_step"],
        "validation": evaluations[-1]["best_score"],
        "steps": config.training.steps,
    }


def distilled(study: Study, out: Path, row: str) -> dict[str, Any]:
    """Distil the sparse model into its dense twin, as a row of Table 6 has it."""
    training = to_mapping(study.run_config("dense").training)
    config = configure(
        teacher=str(study.out / "pretrain-sparse"),
        baseline=str(study.out / "pretrain-dense"),
        overrides=[f"training.{name}={json.dumps(value)}" for name, value in training.items()],
        **ROWS[row],
    )
    result: dict[str, Any] = {}  # the main process of a job alone is told it
    for event in distill(config, out, resume=True):
        result = event.get("result", result)
    return {name: value for name, value in result.items() if name != "configuration"}


def most_frequent(examples: Sequence[Example]) -> str:
    """Return the target that a guess without looking would be."""
    counts: dict[str, int] = {}
    for example in examples:
        counts[example.target] = counts.get(example.target, 0) + 1
    return max(counts, key=counts.__getitem__)
