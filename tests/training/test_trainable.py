import pytest
import torch

from switchlm.errors import ConfigError
from switchlm.model.config import RouterConfig
from switchlm.training.config import TrainingConfig
from switchlm.training.loop import train
from switchlm.training.optimizer import build_optimizer, optimizer_state, train_only


def is_expert(name):
    return ".experts." in name


def is_router(name):
    return ".router." in name


CHANGES = {
    "all": lambda name: True,
    "non-expert": lambda name: not is_expert(name),
    "expert": is_expert,
    "router": is_router,
}


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("part", CHANGES)
def test_exactly_these_parameters_change(build, loader, part, optimizer):
    model = build(router=RouterConfig(balance="bias"), gated=True, tied_head=False)
    train_only(model, part)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = TrainingConfig(steps=3, warmup_steps=0, optimizer=optimizer, evaluate_every=None)
    list(train(model, loader, config))
    changed = {
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert changed == {name for name in before if CHANGES[part](name)}


@pytest.mark.parametrize("part", CHANGES)
def test_what_is_frozen_has_no_gradient_and_no_state(build, loader, part):
    model = build(dropout=0.1, expert_dropout=0.4)
    train_only(model, part)
    list(train(model, loader, TrainingConfig(steps=1, evaluate_every=None)))
    state = optimizer_state(model, build_optimizer(model, TrainingConfig()))
    for name, parameter in model.named_parameters():
        trains = CHANGES[part](name)
        assert parameter.requires_grad == trains
        assert (name in state) == trains
        assert trains or parameter.grad is None, name


@pytest.mark.parametrize("part", ["expert", "router"])
def test_a_dense_model_has_no_such_parameters(build, part):
    with pytest.raises(ConfigError, match=f"is dense, so it has no {part} parameters"):
        train_only(build(num_experts=0), part)
