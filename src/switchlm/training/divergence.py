"""When training has failed for good, and what to say then.

A single step whose loss or gradients are not finite is skipped. Many in a row mean that the weights
themselves are broken, mostly by the last update that was made: no later step mends them.
"""

import math
from typing import Any

from switchlm.checkpoint.store import CheckpointStore
from switchlm.errors import DivergedError
from switchlm.training.config import TrainingConfig

IN_A_ROW = 20  # failed steps that end a run
AT_THE_END = 3  # the same for the last steps of a run, or half of its steps
TIMES_WORSE = 5  # than guessing, or than the first step: a loss that counts as a failure


class FailedSteps:
    """Counts the failed steps in a row.

    A step fails if it was skipped, or if its loss is `TIMES_WORSE` times that of the first step
    and that of a guess, ln(vocabulary).

    in_a_row: up to the newest step.
    """

    def __init__(self, vocabulary_size: int) -> None:
        self.guess = math.log(vocabulary_size)
        self.first_loss: float | None = None
        self.in_a_row = 0

    @property
    def worst(self) -> float:
        """The largest loss that is no failure, in nats per target."""
        return TIMES_WORSE * max(self.guess, self.first_loss or 0.0)

    def add(self, loss: float, skipped: bool) -> None:
        """Count a step."""
        if self.first_loss is None and not skipped:
            self.first_loss = loss
        self.in_a_row = self.in_a_row + 1 if skipped or loss > self.worst else 0

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"first_loss": self.first_loss, "in_a_row": self.in_a_row}

    def restore(self, state: dict[str, Any]) -> None:
        """Load what `state` returned; checkpoints of older versions have none."""
        self.first_loss, self.in_a_row = state.get("first_loss"), state.get("in_a_row", 0)


def stop_diverged(
    what: str, step: int, failed: int, store: CheckpointStore | None, config: TrainingConfig
) -> None:
    """Raise DivergedError, and delete checkpoints of broken weights if there is a good one.

    A checkpoint is good if the step after it was: the last step before the failures may have broken
    the weights.

    what: what was found, as a sentence about the last steps.
    failed: the number of failed steps up to `step`.
    """
    good = [known for known in store.steps() if known < step - failed] if store else []
    if store is not None and good:
        store.discard_after(good[-1])
        kept = (
            f"The last good checkpoint, of step {good[-1]}, is kept in {str(store.folder)!r}: "
            "go on from it with --resume and"
        )
    else:
        kept = (
            "There is no checkpoint from before that: begin again, with --resume or another --out, "
            "and with"
        )
    clip = "none" if config.gradient_clip is None else f"{config.gradient_clip:g}"
    raise DivergedError(
        f"Training stopped at step {step}: {what} {kept} a lower training.learning_rate (it is "
        f"{config.learning_rate:g}), a longer training.warmup_steps (it is {config.warmup_steps}) "
        f"or a smaller training.gradient_clip (it is {clip}). If it stops at the same step again, "
        "look at the data that is read there."
    )
