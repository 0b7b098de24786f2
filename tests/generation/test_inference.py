import pytest
import torch

from switchlm.generation.inference import dropless, evaluation_mode


def test_the_mode_of_every_module_is_put_back(build):
    model = build().train()
    model.decoder.eval()
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert model.training
    assert model.encoder.training
    assert not model.decoder.training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    "router",
    [
        {"evaluation_capacity_factor": 0.1, "min_capacity": 1},
        {"evaluation_capacity_factor": 0.1, "min_capacity": 1, "reroute_overflow": True},
        {"mode": "hf", "expert_capacity": 1},
    ],
    ids=["factor", "rerouting", "absolute"],
)
def test_dropless_drops_nothing_and_puts_the_capacity_back(build, router):
    model = build(router=router)
    inputs_BS = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(1))
    configured = [m.config for m in model.modules() if hasattr(m, "experts_choose")]
    with dropless(model):
        _, routing = model.encode(inputs_BS)
        assert all(layer.kept_A.all() for layer in routing)
        assert all(layer.balance_loss == 0 for layer in routing)
    assert [m.config for m in model.modules() if hasattr(m, "experts_choose")] == configured
    _, routing = model.encode(inputs_BS)
    assert not all(layer.kept_A.all() for layer in routing)
    assert all(layer.balance_loss > 0 for layer in routing)
