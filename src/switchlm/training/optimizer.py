"""The optimizer: parameter groups, frozen parameters, and learning rate schedules.

Frozen parameters have requires_grad False, so neither optimizer state nor gradient buffers exist
for them.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from switchlm.config import check_choice
from switchlm.errors import ConfigError
from switchlm.training.adafactor import Adafactor
from switchlm.training.config import TrainingConfig


def parameter_groups(model: nn.Module, config: TrainingConfig) -> list[dict[str, Any]]:
    """Return groups for weights, experts, routers, position biases and norms.

    The last two have no weight decay. `rate_factor` of a group multiplies the learning rate.
    """
    groups: dict[str, dict[str, Any]] = {
        "weights": {"rate_factor": 1.0},
        "experts": {"rate_factor": config.expert_learning_rate_factor},
        "routers": {"rate_factor": config.router_learning_rate_factor},
        "positions": {
            "rate_factor": config.position_learning_rate_factor,
            "weight_decay": 0.0,
        },
        "norms": {"rate_factor": 1.0, "weight_decay": 0.0},
    }
    for group in groups.values():
        group["params"] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[group_of(name, parameter)]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def group_of(name: str, parameter: Tensor) -> str:
    """Return the group of a parameter of SwitchTransformer."""
    if "relative_bias" in name:
        return "positions"
    if parameter.dim() < 2:
        return "norms"
    if ".experts." in name:
        return "experts"
    if ".router." in name:
        return "routers"
    return "weights"


def build_optimizer(model: nn.Module, config: TrainingConfig) -> Optimizer:
    """Return the configured optimizer with its state allocated, so that a checkpoint can be loaded.

    Both kinds read `found_inf` and `grad_scale` (see step.py).
    """
    groups = parameter_groups(model, config)
    if config.optimizer == "adafactor":
        return Adafactor(
            groups,
            weight_decay=config.weight_decay,
            scale_by_parameter=config.scale_by_parameter,
            per_expert_rms=config.per_expert_rms,
        )
    first, second = config.betas
    optimizer = AdamW(groups, betas=(first, second), weight_decay=config.weight_decay, fused=True)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return optimizer


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """Set every group's learning rate for the coming step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["rate_factor"]


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Tensor]]:
    """Return the optimizer's state by parameter name; loading into its tensors restores it."""
    return {
        name: dict(optimizer.state[parameter])
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
    }


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Return the learning rate of step `step`, counted from 0.

    Every schedule rises linearly to `learning_rate` over `warmup_steps`. Then
    `constant` stays;
    `inverse_sqrt` stays up to step d and then falls as sqrt(d / step), d = `decay_steps` or the
        warm-up; T5's is learning_rate 0.01, no warm-up, d = 10,000 (Raffel et al. 2020);
    `linear` falls to zero at `steps`;
    `wsd` (warm-up, stable, decay) stays, and falls linearly to zero over the last `decay_steps`, by
        default a fifth of `steps`.
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


Trainable = Literal["all", "non-expert", "expert", "router"]


def train_only(model: nn.Module, part: Trainable) -> None:
    """Freeze all parameters of a SwitchTransformer but those of `part`, in place.

    `non-expert` is everything but the weights of experts, so it includes routers. Raises
    ConfigError if no parameter is left, as for `expert` and `router` of a dense model.
    """
    check_choice(part, Trainable, "part")
    chosen = 0
    for name, parameter in model.named_parameters():
        group = group_of(name, parameter)
        trains = {
            "all": True,
            "non-expert": group != "experts",
            "expert": group == "experts",
            "router": group == "routers",
        }[part]
        parameter.requires_grad_(trains)
        chosen += trains
    if not chosen:
        raise ConfigError(
            f"There is nothing to train: the model is dense, so it has no {part} parameters. "
            "Choose all or non-expert."
        )
