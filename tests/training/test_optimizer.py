import copy

import pytest
import torch

from switchlm.training.adafactor import Adafactor
from switchlm.training.config import TrainingConfig
from switchlm.training.optimizer import (
    build_optimizer,
    group_of,
    optimizer_state,
    parameter_groups,
    set_learning_rate,
)
from switchlm.training.step import training_step


def test_every_parameter_is_in_one_group(build):
    model = build(activation="gelu", gated=True, tied_head=False)
    groups = parameter_groups(model, TrainingConfig())
    found = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(found) == sorted(id(parameter) for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("embedding.weight", "weights"),
        ("encoder.blocks.0.attention.query.weight", "weights"),
        ("encoder.blocks.0.feedforward.up.weight", "weights"),
        ("encoder.blocks.1.feedforward.experts.up", "experts"),
        ("decoder.blocks.1.feedforward.router.weight", "routers"),
        ("encoder.final_norm.weight", "norms"),
        ("decoder.relative_bias.weight", "positions"),
    ],
)
def test_parameters_fall_into_their_groups(build, name, group):
    assert group_of(name, build().get_parameter(name)) == group


def test_norms_and_biases_are_not_decayed(build, loader):
    model = build()
    before = copy.deepcopy(model.state_dict())
    config = TrainingConfig(weight_decay=0.5)
    optimizer = build_optimizer(model, config)
    set_learning_rate(optimizer, 0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        decayed = group_of(name, parameter) not in ("norms", "positions")
        expected = before[name] * (0.95 if decayed else 1.0)
        torch.testing.assert_close(parameter.detach(), expected)


def test_learning_rate_factors_reach_their_parameters(build):
    model = build()
    config = TrainingConfig(
        expert_learning_rate_factor=3.0,
        router_learning_rate_factor=0.5,
        position_learning_rate_factor=2.0,
    )
    optimizer = build_optimizer(model, config)
    set_learning_rate(optimizer, 0.1)
    rates = {
        group_of(name, parameter): group["lr"]
        for group in optimizer.param_groups
        for name, parameter in model.named_parameters()
        if any(parameter is member for member in group["params"])
    }
    assert rates == pytest.approx(
        {"weights": 0.1, "experts": 0.3, "routers": 0.05, "positions": 0.2, "norms": 0.1}
    )


def test_adamw_equals_torch(build, loader):
    """Our steps, clipping included, against torch's plain AdamW and clip_grad_norm_."""
    mine, theirs = build(), build()
    config = TrainingConfig(weight_decay=0.1, betas=(0.8, 0.95))
    optimizer = build_optimizer(mine, config)
    plain = parameter_groups(theirs, config)
    reference = torch.optim.AdamW(
        plain, betas=(0.8, 0.95), weight_decay=0.1, fused=False, foreach=False
    )
    for step in range(4):
        batch = loader.batch(step)
        set_learning_rate(optimizer, 0.01)
        set_learning_rate(reference, 0.01)
        torch.manual_seed(step)
        training_step(mine, optimizer, [batch], gradient_clip=0.5)
        torch.manual_seed(step)
        # Any optimizer that ignores its own step leaves the gradients behind.
        training_step(theirs, _Still(theirs), [batch])
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        reference.step()
    for (name, ours), expected in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6, msg=name)


class _Still(torch.optim.SGD):
    """Makes gradients, changes nothing."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model.parameters(), lr=0.0)

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        pass


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
def test_state_is_there_from_the_start_and_is_live(build, loader, kind):
    model = build()
    optimizer = build_optimizer(model, TrainingConfig(optimizer=kind))
    state = optimizer_state(model, optimizer)
    assert state.keys() == dict(model.named_parameters()).keys()
    assert all(not tensor.any() for entry in state.values() for tensor in entry.values())
    set_learning_rate(optimizer, 0.01)
    training_step(model, optimizer, [loader.batch(0)])
    assert all(entry["step"] == 1 for entry in state.values())
    assert optimizer_state(model, optimizer)["embedding.weight"].keys() == (
        state["embedding.weight"].keys()
    )


def test_adafactor_takes_its_options(build):
    model = build()
    config = TrainingConfig(optimizer="adafactor", scale_by_parameter=False, per_expert_rms=True)
    optimizer = build_optimizer(model, config)
    assert isinstance(optimizer, Adafactor)
    assert all(group["per_expert_rms"] for group in optimizer.param_groups)
    assert not any(group["scale_by_parameter"] for group in optimizer.param_groups)
