"""The optimizer: which parameters it treats how, and its state by parameter name."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from switchlm.training.adafactor import Adafactor
from switchlm.training.config import TrainingConfig


def parameter_groups(model: nn.Module, config: TrainingConfig) -> list[dict[str, Any]]:
    """Return groups for weights, experts, routers, position biases and norms.

    The last two are not decayed.

    Each has `rate_factor`, by which the schedule's learning rate is multiplied.
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
    """Return the optimizer as configured, its state there from the start, so that it can be loaded.

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
    """Return the optimizer's own tensors by the names of the parameters.

    For checkpoints: they are the live tensors, so that loading into them restores the optimizer.
    """
    return {
        name: dict(optimizer.state[parameter])
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
    }
