"""Initialisation: small, by fan-in, and the same whatever the number of experts (section 2.4).

The distributions are T5X's: truncated normal for FFNs, experts and an untied head, normal for
attention with queries scaled down by sqrt(d_kv) (the scores are not scaled), N(0, 0.02) for
routers, N(0, 1) for the embedding, uniform by fan average for relative biases.
"""

import math

import torch
from torch import Tensor, nn

from switchlm.model.config import ModelConfig
from switchlm.model.experts import Experts
from switchlm.model.router import Router

ROUTER_STD = 0.02
# The standard deviation of a unit normal cut at two standard deviations.
TRUNCATED_STD = 0.87962566103423978


@torch.no_grad()
def truncated_normal_(weight: Tensor, fan_in: int, scale: float) -> None:
    """Fill with a normal of std sqrt(scale / fan_in), cut at two standard deviations."""
    std = math.sqrt(scale / fan_in) / TRUNCATED_STD
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


@torch.no_grad()
def initialise_switch(router: Router, experts: Experts, scale: float) -> None:
    """Initialise the parts of a Switch layer; each expert as if it were alone."""
    nn.init.normal_(router.weight, std=ROUTER_STD)
    if router.bias_E is not None:
        router.bias_E.zero_()
    for weight_EDF in experts.parameters():
        truncated_normal_(weight_EDF, weight_EDF.shape[1], scale)


@torch.no_grad()
def initialise(model: nn.Module, config: ModelConfig) -> None:
    """Initialise every parameter of a SwitchTransformer in place."""
    scale = config.initialisation_scale
    for name, module in model.named_modules():
        kind = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        elif kind == "relative_bias":
            bound = math.sqrt(3 * scale / (sum(module.weight.shape) / 2))
            nn.init.uniform_(module.weight, -bound, bound)
        elif hasattr(module, "router"):
            initialise_switch(module.router, module.experts, scale)
        elif isinstance(module, nn.Linear):
            fan_in = module.in_features * (config.d_kv if kind == "query" else 1)
            if kind in ("query", "key", "value", "output"):
                nn.init.normal_(module.weight, std=math.sqrt(scale / fan_in))
            else:
                truncated_normal_(module.weight, fan_in, scale)
        elif kind.endswith("norm"):
            nn.init.ones_(module.weight)
