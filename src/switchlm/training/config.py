"""The `training` and `kernels` sections of a configuration."""

from dataclasses import dataclass
from typing import Literal

from switchlm.config import check_choices
from switchlm.errors import ConfigError
from switchlm.model.precision import Precision


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """The kernels of a run (docs/guides/kernels.md).

    switch: how the feed-forward of a Switch layer runs: `separate` runs dispatch, experts and
        combine one after the other; `fused` in one kernel, and fails if no kernel supports the
        layers; `auto` takes the faster. All processes of a job take the same.
    """

    switch: Literal["auto", "separate", "fused"] = "auto"

    def __post_init__(self) -> None:
        check_choices(self, "kernels")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The settings of `training.loop.train`.

    steps: optimisation steps.
    seconds: of training, after which the run ends even if steps remain; None for no limit.
    learning_rate: the maximum of the schedule.
    schedule: after the warm-up `constant` stays, `inverse_sqrt` falls as T5's, `linear` falls to
        zero, and `wsd` stays and falls to zero at the end; see `learning_rate` in optimizer.py.
    warmup_steps: steps in which the rate rises linearly from zero.
    decay_steps: of `inverse_sqrt` the step from which it falls; of `wsd` the length of the decay.
    optimizer: `adamw`, or `adafactor` as T5.
    betas: of AdamW.
    weight_decay: of all parameters but norms and position biases.
    scale_by_parameter: of Adafactor, multiply steps by the root mean square of a parameter.
    per_expert_rms: of Adafactor, root mean squares of each expert, not of the stack.
    expert_learning_rate_factor: multiplies the learning rate of experts.
    router_learning_rate_factor: multiplies the learning rate of routers.
    position_learning_rate_factor: multiplies the learning rate of relative position biases.
    gradient_clip: largest norm of all gradients together; None for no clipping.
    accumulate: loader batches per step (gradient accumulation).
    precision: `float32`, `selective` (bfloat16 with float32 routers) or `bfloat16`.
    activation_checkpointing: recompute the blocks in the backward pass to save memory.
    compile: compile the model with torch.compile; slow to start.
    device: where to compute: `auto` is an accelerator if there is one; cpu, cuda, cuda:1, mps.
    seed: of initial weights, order of samples, masks and dropout.
    log_every, evaluate_every, checkpoint_every: in steps; None for never.
    evaluate_batches: held-out batches per evaluation.
    keep_checkpoints: number of checkpoints to keep; older ones are deleted.
    tensorboard: also write TensorBoard files.
    wandb: project at Weights & Biases to log to; None for none.
    """

    steps: int = 10_000
    seconds: float | None = None
    learning_rate: float = 1e-3
    schedule: Literal["inverse_sqrt", "linear", "constant", "wsd"] = "inverse_sqrt"
    warmup_steps: int = 100
    decay_steps: int | None = None
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    betas: tuple[float, ...] = (0.9, 0.999)
    weight_decay: float = 0.0
    scale_by_parameter: bool = True
    per_expert_rms: bool = False
    expert_learning_rate_factor: float = 1.0
    router_learning_rate_factor: float = 1.0
    position_learning_rate_factor: float = 1.0
    gradient_clip: float | None = 1.0
    accumulate: int = 1
    precision: Precision = "float32"
    activation_checkpointing: bool = False
    compile: bool = False
    device: str = "auto"
    seed: int = 0
    log_every: int = 50
    evaluate_every: int | None = 500
    evaluate_batches: int = 8
    checkpoint_every: int | None = 1000
    keep_checkpoints: int = 3
    tensorboard: bool = False
    wandb: str | None = None

    def __post_init__(self) -> None:
        check_choices(self, "training")
        for name in ("steps", "accumulate", "log_every", "evaluate_batches", "keep_checkpoints"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("evaluate_every", "checkpoint_every"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "at least 1, or null for never")
        for name in ("learning_rate", "seconds", "gradient_clip"):
            value = getattr(self, name)
            _require(value is None or value > 0, name, value, "positive")
        for name in ("warmup_steps", "weight_decay", "seed"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for part in ("expert", "router", "position"):
            name = f"{part}_learning_rate_factor"
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        _require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            "betas",
            self.betas,
            "two numbers in [0, 1)",
        )
        decay = self.decay_steps
        _require(decay is None or decay >= 1, "decay_steps", decay, "at least 1, or null")
        if self.schedule == "wsd" and decay is not None and decay > self.steps:
            raise ConfigError(
                f"training.decay_steps is {decay}, but the run has only {self.steps} steps "
                "(training.steps); with schedule=wsd it is the length of the last part."
            )


def _require(holds: bool, name: str, value: object, what: str) -> None:
    if not holds:
        raise ConfigError(f"training.{name} must be {what}, got {value!r}.")
