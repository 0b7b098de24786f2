"""Which part of a model trains: all of it, or all but experts, experts or routers alone.

What is frozen asks for no gradient, so that the optimizer holds nothing for it and the backward
pass makes no buffer for it.
"""

from typing import Literal

from torch import nn

from switchlm.errors import ConfigError
from switchlm.training.optimizer import group_of

Trainable = Literal["all", "non-expert", "expert", "router"]


def train_only(model: nn.Module, part: Trainable) -> None:
    """Freeze all parameters of a SwitchTransformer but those of `part`, in place.

    `non-expert` is everything but the weights of experts, routers included. Raises ConfigError for
    a dense model, which has neither experts nor routers.
    """
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
