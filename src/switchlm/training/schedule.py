"""The learning rate as a pure function of the step."""

import math

from switchlm.training.config import TrainingConfig


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Return the learning rate of step `step`, counted from 0.

    Every schedule rises linearly to `learning_rate` over `warmup_steps`. Then
    `constant` stays;
    `inverse_sqrt` stays up to step d and falls as sqrt(d / step) from there, d = `decay_steps` or
        the warm-up; T5's rule is learning_rate 0.01, no warm-up, d = 10,000 (Raffel et al. 2020);
    `linear` falls to zero at `steps`;
    `wsd` (warm-up, stable, decay) stays, and falls linearly to zero over the last `decay_steps`, a
        fifth of all if not given.
    """
    rate, done = config.learning_rate, step + 1
    if done < config.warmup_steps:
        return rate * done / config.warmup_steps
    if config.schedule == "inverse_sqrt":
        start = config.decay_steps or max(config.warmup_steps, 1)
        return rate * math.sqrt(start / max(done, start))
    if config.schedule == "linear":
        return rate * _remaining(step, config.steps, config.steps - config.warmup_steps)
    if config.schedule == "wsd":
        return rate * _remaining(step, config.steps, config.decay_steps or config.steps // 5)
    return rate


def _remaining(step: int, end: int, length: int) -> float:
    """Return the share of the last `length` steps before `end` still to come, at most 1."""
    return min(1.0, max(0.0, (end - step) / max(length, 1)))
