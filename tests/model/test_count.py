import dataclasses
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from switchlm.model.config import ModelConfig, RouterConfig
from switchlm.model.count import active_parameters, flops_per_token, parameters
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer

DROPLESS = RouterConfig(capacity_factor=None, evaluation_capacity_factor=None)


def changed(**changes: Any) -> ModelConfig:
    return dataclasses.replace(preset("nano"), router=DROPLESS, **changes)


@pytest.mark.parametrize(
    "config",
    [
        changed(),
        changed().dense_twin(),
        changed(gated=True, activation="gelu", tied_head=False, sparse_step=1),
        changed(decoder_sparse_step=0),
        changed(attention_experts=True, sparse_step=1),
    ],
    ids=["nano", "dense", "gated", "sparse encoder", "switch attention"],
)
def test_flops_are_those_that_torch_counts(config: ModelConfig) -> None:
    model = SwitchTransformer(config)
    inputs_BS = torch.randint(3, 300, (2, 24))
    targets_BT = torch.randint(3, 300, (2, 10))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(inputs_BS, targets_BT)
    assert flops_per_token(config, 24, 10) * 2 * (24 + 10) == counter.get_total_flops()


def test_the_dense_twin_costs_as_much_but_for_the_router() -> None:
    sparse, dense = preset("nano"), preset("dense-nano")
    # One Switch layer in each stack of two layers: a router of [D, E].
    router = 2 * sparse.d_model * sparse.num_experts
    assert flops_per_token(sparse, 24, 10) - flops_per_token(dense, 24, 10) == router


@pytest.mark.parametrize("name", ["nano", "tiny"])
def test_parameters_are_the_models(name: str) -> None:
    config = preset(name)
    model = SwitchTransformer(config)
    assert parameters(config) == sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    idle = experts * (config.num_experts - 1) // config.num_experts
    assert active_parameters(config) == parameters(config) - idle


def test_top_2_uses_two_experts() -> None:
    one = preset("nano")
    two = dataclasses.replace(one, router=RouterConfig(experts_per_token=2))
    expert = 2 * one.d_model * one.d_ff * 2  # up and down, in a layer of each stack
    assert active_parameters(two) - active_parameters(one) == expert
    assert flops_per_token(two, 8, 8) - flops_per_token(one, 8, 8) == expert
