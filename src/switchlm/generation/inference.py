"""Modes of a model for inference: no dropout, no exploration, no gradients, no dropped tokens.

They change the model in place and put it back, so a model serves one thread at a time.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from switchlm.model.router import Router


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Turn off dropout, exploration and gradients; put every module's own mode back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def dropless(module: nn.Module) -> Iterator[None]:
    """Let every token reach its expert, whatever capacity the routers have.

    Capacity is shared by all tokens of a group, other users' prompts and padding included; without
    it what becomes of a token depends on its own row alone. Experts that choose their tokens keep
    their capacity, which is what they choose by. Routers measure no losses meanwhile.
    """
    routers = [part for part in module.modules() if isinstance(part, Router)]
    routers = [router for router in routers if not router.experts_choose]
    configured = [(router.config, router.measures) for router in routers]
    for router in routers:
        router.config = dataclasses.replace(
            router.config,
            capacity_factor=None,
            evaluation_capacity_factor=None,
            expert_capacity=None,
            reroute_overflow=False,
        )
        router.measures = False
    try:
        yield
    finally:
        for router, (config, measures) in zip(routers, configured, strict=True):
            router.config, router.measures = config, measures
