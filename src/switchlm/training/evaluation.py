"""Evaluation during training: held-out loss, or a score with early stopping and a best model.

The loop calls an `Evaluator`, which returns metrics and whether to end the run. Its state is in the
checkpoints, so that a resumed run stops at the same step as an uninterrupted one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from switchlm.data.batch import Batch
from switchlm.data.text.tokenizer import Tokenizer
from switchlm.evaluation.diagnostics import diagnose
from switchlm.evaluation.evaluator import held_out_loss
from switchlm.model.precision import in_float32
from switchlm.model.transformer import SwitchTransformer
from switchlm.parallel.apply import gather_model
from switchlm.parallel.mesh import ALONE, Mesh


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """Metrics for the line of an evaluation, and whether to end the run."""

    metrics: Mapping[str, Any]
    stop: bool = False


class Evaluator(Protocol):
    """Evaluates the model of a run every `evaluate_every` steps, and at its end.

    when_stopped: whether to evaluate once more when the user stops a run. False if that changes the
        evaluator's state, because a resumed run would then differ from an uninterrupted one.
    """

    when_stopped: bool

    def evaluate(self, model: SwitchTransformer, step: int) -> EvaluationResult:
        """Evaluate the model after `step` steps; its training mode is left as it was."""
        ...

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint: JSON values."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Load what `state` returned."""
        ...


class HeldOutLoss:
    """The loss of pre-training on fixed batches; it never ends a run.

    A single process adds diagnostics of the first batch (see evaluation/diagnostics.py). The state
    is the experts of that batch's tokens at the evaluation before. If the user stops a run, its
    extra evaluation comes after the checkpoint, so that it does not change the saved state.
    """

    when_stopped = True

    def __init__(
        self,
        batches: Sequence[Batch],
        sources: Sequence[str],
        mesh: Mesh = ALONE,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.batches, self.sources, self.mesh, self.tokenizer = batches, sources, mesh, tokenizer
        self.experts: dict[str, list[int]] = {}

    def evaluate(self, model: SwitchTransformer, step: int) -> EvaluationResult:
        """Return evaluation_loss and evaluation_loss_by_source, nats per target, and the diagnosis.

        With a tokenizer evaluation_bits_per_byte too, None if there is no text.

        On many processes there is no diagnosis: the weights of a sharded model are gathered only
        in its own forward pass.
        """
        result = held_out_loss(
            model, self.batches, self.sources, self.mesh, tokenizer=self.tokenizer
        )
        by_source = {name: part["loss"] for name, part in result["sources"].items()}
        metrics: dict[str, Any] = {
            "evaluation_loss": result["loss"],
            "evaluation_loss_by_source": by_source,
        }
        if self.tokenizer is not None:
            metrics["evaluation_bits_per_byte"] = result["bits_per_byte"]
        if self.mesh.world_size == 1:
            diagnosis = diagnose(model, self.batches[0])
            metrics |= diagnosis.metrics(self.experts)
            self.experts = diagnosis.experts()
        else:
            self.experts = {}
        return EvaluationResult(metrics=metrics)

    def state(self) -> dict[str, Any]:
        return {"experts": self.experts}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.experts = dict(state.get("experts", {}))


@dataclass(kw_only=True)
class BestCheckpoint:
    """Keeps the model of the best score, and ends the run after `patience` (early stopping).

    A sharded model is gathered in every process first, and the model computes in float32, so that
    its score is that of the saved model.

    score: returns the metrics of a model, `score` among them, higher is better.
    keep: called with every new best model; of equal scores the first is kept.
    patience: evaluations in a row without a new best after which the run ends; None for no limit.
    best_step, best_score: of the best evaluation so far.
    misses: evaluations since then.
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
        with in_float32(model):
            metrics = self.score(model)
        score = float(metrics["score"])
        if self.best_score is None or score > self.best_score:
            self.keep(model)
            self.best_step, self.best_score, self.misses = step, score, 0
        else:
            self.misses += 1
        return EvaluationResult(
            metrics={**metrics, "best_score": self.best_score, "best_step": self.best_step},
            stop=self.patience is not None and self.misses >= self.patience,
        )

    def state(self) -> dict[str, Any]:
        return {"step": self.best_step, "score": self.best_score, "misses": self.misses}

    def restore(self, state: Mapping[str, Any]) -> None:
        # The checkpoint may be of a run with another evaluator, whose state lacks these keys.
        self.best_step, self.best_score = state.get("step"), state.get("score")
        self.misses = state.get("misses", 0)
