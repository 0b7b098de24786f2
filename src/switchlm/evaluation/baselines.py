"""What scores are worth: those of always giving one answer, and of guessing among the labels.

Shapes: N examples, K statistics, L labels.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from switchlm.data.tasks.task import Example, Task
from switchlm.errors import ConfigError
from switchlm.evaluation.metrics import Labels, find_metric, measure

MOST_LABELS = 50  # different targets that may be labels


@dataclass(frozen=True, kw_only=True)
class Baselines:
    """The scores of a task's examples that need no model, in per cent by metric.

    answer: the most frequent target.
    majority: for giving it always.
    chance: for guessing among the labels, each equally likely; None for free text.
    """

    answer: str
    majority: Mapping[str, float]
    chance: Mapping[str, float] | None

    def best(self, metric: str) -> float:
        """The higher one of a metric, in per cent."""
        return max(self.majority[metric], (self.chance or {}).get(metric, 0.0))


def baselines(task: Task, examples: Sequence[Example]) -> Baselines:
    """Compute the baselines of all metrics of a task; of equally frequent targets the first counts.

    A guess has the expected counts of right and wrong answers, and the metric is taken of those.
    """
    (answer, _), *_ = Counter(example.target for example in examples).most_common(1)
    found = measure(task.metrics, [answer] * len(examples), examples, task.labels, resamples=1)
    labels = guessed_labels(task, examples)
    return Baselines(
        answer=answer,
        majority={name: part.value for name, part in found.items()},
        chance=None
        if labels is None
        else {name: _chance(name, examples, task.labels, labels) for name in task.metrics},
    )


def _chance(
    name: str, examples: Sequence[Example], task_labels: Labels, labels: Sequence[str]
) -> float:
    metric = find_metric(name)
    sums_LK = [
        metric.statistics([label] * len(examples), examples, task_labels).sum(0) for label in labels
    ]
    return 100 * float(metric.combine(np.mean(sums_LK, axis=0)))


def guessed_labels(task: Task, examples: Sequence[Example]) -> tuple[str, ...] | None:
    """Return the labels of a task, or of a user's file its targets if most come several times."""
    if task.labels is not None:
        return task.labels
    targets = sorted({example.target for example in examples})
    few = len(targets) <= min(MOST_LABELS, len(examples) // 2)
    return tuple(targets) if few else None


def labels_to_rank(task: Task, examples: Sequence[Example]) -> tuple[str, ...]:
    """Return the labels of a task, or of a user's file its different targets.

    Raises ConfigError if those are more than MOST_LABELS.
    """
    if task.labels is not None:
        return task.labels
    targets = sorted({example.target for example in examples})
    if len(targets) > MOST_LABELS:
        raise ConfigError(
            f"The task {task.name!r} has no labels to rank: its {len(examples):,} examples have "
            f"{len(targets):,} different targets. Name the possible ones with --label, or leave "
            "--rank-labels out."
        )
    return tuple(targets)
