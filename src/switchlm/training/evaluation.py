"""How the loop has its model judged: figures for a line, and whether there is a point in going on.

The loop asks, an evaluator answers with an `EvaluationResult`, and knows nothing of the loop. What
it remembers from one evaluation to the next stands in the checkpoints, so that a resumed run
decides as the undisturbed one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from switchlm.data.batch import Batch
from switchlm.evaluation.diagnostics import diagnose
from switchlm.evaluation.evaluator import held_out_loss
from switchlm.model.transformer import SwitchTransformer
from switchlm.parallel.apply import gather_model
from switchlm.parallel.mesh import ALONE, Mesh


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """What an evaluation found: figures for its metrics line, and whether to end the run."""

    figures: Mapping[str, Any]
    stop: bool = False


class Evaluator(Protocol):
    """Judges the model of a run every `evaluate_every` steps, and at its end.

    when_stopped: whether to judge once more where the user stops a run in between. Not if it
        remembers, for the resumed run would then not be the undisturbed one.
    """

    when_stopped: bool

    def evaluate(self, model: SwitchTransformer, step: int) -> EvaluationResult:
        """Judge the model as it is after `step` steps, and leave it in its mode."""
        ...

    def state(self) -> dict[str, Any]:
        """Return what it remembers, as numbers, for a checkpoint."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned."""
        ...


class HeldOutLoss:
    """The loss of pre-training on fixed batches; it never ends a run.

    A single process measures besides what the layers do, on the first batch alone, so that it adds
    little to an evaluation (see evaluation/diagnostics.py). What it remembers are experts that
    tokens of that batch had at the evaluation before. An evaluation out of turn, where the user
    stops a run, comes after the checkpoint, so that the resumed run compares as the undisturbed.
    """

    when_stopped = True

    def __init__(
        self, batches: Sequence[Batch], sources: Sequence[str], mesh: Mesh = ALONE
    ) -> None:
        self.batches, self.sources, self.mesh = batches, sources, mesh
        self.experts: dict[str, list[int]] = {}

    def evaluate(self, model: SwitchTransformer, step: int) -> EvaluationResult:
        """Return evaluation_loss and evaluation_loss_by_source, nats per target, and the diagnosis.

        On many processes there is no diagnosis: the weights of a sharded model are together only
        while its own forward pass runs.
        """
        result = held_out_loss(model, self.batches, self.sources, self.mesh)
        by_source = {name: part["loss"] for name, part in result["sources"].items()}
        figures = {"evaluation_loss": result["loss"], "evaluation_loss_by_source": by_source}
        if self.mesh.world_size == 1:
            diagnosis = diagnose(model, self.batches[0])
            figures |= diagnosis.metrics(self.experts)
            self.experts = diagnosis.experts()
        else:
            self.experts = {}
        return EvaluationResult(figures=figures)

    def state(self) -> dict[str, Any]:
        return {"experts": self.experts}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.experts = dict(state.get("experts", {}))


@dataclass(kw_only=True)
class BestCheckpoint:
    """Keeps the model of the best score and ends the run when scores stay below it.

    A model that is spread over processes is put together in each of them first.

    score: gives the figures of a model, `score` among them, higher is better.
    keep: told of every new best model, at once; of equal scores the first counts.
    patience: end the run after that many evaluations in a row without a new best; None never does.
    best_step, best_score: of the best evaluation so far; `misses` counts those since then.
    """

    score: Callable[[SwitchTransformer], Mapping[str, Any]]
    keep: Callable[[SwitchTransformer], None]
    patience: int | None = None
    best_step: int | None = None
    best_score: float | None = None
    misses: int = 0
    when_stopped = False

    def evaluate(self, model: SwitchTransformer, step: int) -> EvaluationResult:
        """Return what `score` gives, and best_score and best_step so far."""
        model = gather_model(model)
        figures = self.score(model)
        score = float(figures["score"])
        if self.best_score is None or score > self.best_score:
            self.keep(model)
            self.best_step, self.best_score, self.misses = step, score, 0
        else:
            self.misses += 1
        return EvaluationResult(
            figures={**figures, "best_score": self.best_score, "best_step": self.best_step},
            stop=self.patience is not None and self.misses >= self.patience,
        )

    def state(self) -> dict[str, Any]:
        return {"step": self.best_step, "score": self.best_score, "misses": self.misses}

    def restore(self, state: Mapping[str, Any]) -> None:
        # A run may have been judged by something else before.
        self.best_step, self.best_score = state.get("step"), state.get("score")
        self.misses = state.get("misses", 0)
