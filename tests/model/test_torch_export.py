"""torch.export of the layer and of the model: equal to eager, also at sizes other than traced."""

import io

import pytest
import torch
from torch import Tensor
from torch.export import Dim, export, load, save
from torch.utils._pytree import tree_leaves

from switchlm.model.config import RouterConfig
from switchlm.model.presets import preset
from switchlm.model.switch import SwitchFeedForward
from switchlm.model.transformer import SwitchTransformer

DYNAMIC = {0: Dim("batch"), 1: Dim("tokens")}
ROUTERS = {
    "dropless": RouterConfig(evaluation_capacity_factor=None),
    "paper": RouterConfig(evaluation_capacity_factor=0.9),
    "t5x": RouterConfig(mode="t5x", evaluation_capacity_factor=0.9, experts_per_token=2),
    "hf": RouterConfig(mode="hf", evaluation_capacity_factor=0.9),
    "reroute": RouterConfig(evaluation_capacity_factor=0.9, reroute_overflow=True),
    "expert_choice": RouterConfig(selection="expert_choice"),
}


def example(batch: int, tokens: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, tokens, 8), torch.rand(batch, tokens) < 0.8


@pytest.mark.parametrize(
    "name",
    ["paper", *(pytest.param(n, marks=pytest.mark.slow) for n in ROUTERS if n != "paper")],
)
def test_programs_of_a_layer_take_any_size(name: str) -> None:
    torch.manual_seed(0)
    layer = SwitchFeedForward(8, 16, 4, router=ROUTERS[name]).eval()
    program = export(layer, example(3, 5), dynamic_shapes=(DYNAMIC, DYNAMIC))
    if name != "t5x":  # PyTorch saves no program that rounds a size
        file = io.BytesIO()
        save(program, file)
        file.seek(0)
        program = load(file)
    module = program.module()
    for batch, tokens in ((3, 5), (2, 9), (70, 61)):  # the last of several groups
        inputs = example(batch, tokens)
        expected, found = layer(*inputs), module(*inputs)
        torch.testing.assert_close(tree_leaves(found), tree_leaves(expected))


@pytest.mark.slow
def test_programs_of_fixed_sizes_and_of_strict_tracing() -> None:
    layer = SwitchFeedForward(8, 16, 4, router=ROUTERS["paper"]).eval()
    inputs = example(3, 5)
    fixed = export(layer, inputs).module()
    strict = export(layer, inputs, dynamic_shapes=(DYNAMIC, DYNAMIC), strict=True).module()
    torch.testing.assert_close(tree_leaves(fixed(*inputs)), tree_leaves(layer(*inputs)))
    inputs = example(30, 50)
    torch.testing.assert_close(tree_leaves(strict(*inputs)), tree_leaves(layer(*inputs)))


def test_programs_of_a_model_take_any_size() -> None:
    model = SwitchTransformer(preset("nano")).eval()
    source = {0: Dim("batch"), 1: Dim("source")}
    target = {0: Dim("batch"), 1: Dim("target")}
    inputs = torch.randint(1, 32, (3, 6)), torch.randint(1, 32, (3, 4))
    shapes = (source, target, None, None)
    program = export(model, (*inputs, None, None), dynamic_shapes=shapes).module()
    inputs = torch.randint(1, 32, (5, 9)), torch.randint(1, 32, (5, 2))
    found, expected = program(*inputs, None, None), model(*inputs)
    torch.testing.assert_close(tree_leaves(found), tree_leaves(expected), rtol=1e-4, atol=1e-5)
