from typing import Any

import pytest
import torch

from switchlm.model.config import ModelConfig, RouterConfig
from switchlm.model.losses import cross_entropy, routing_losses
from switchlm.model.router import Router
from switchlm.model.routing import ModelOutput, Routing


def test_cross_entropy_sums_over_the_targets_that_count() -> None:
    torch.manual_seed(0)
    logits_BTV = torch.randn(2, 3, 5, requires_grad=True)
    targets_BT = torch.randint(5, (2, 3))
    mask_BT = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    summed, count = cross_entropy(logits_BTV, targets_BT, mask_BT)
    losses = -logits_BTV.log_softmax(-1).gather(-1, targets_BT[..., None])[..., 0]
    torch.testing.assert_close(summed, losses[mask_BT].sum())
    assert count == 3
    summed.backward()
    assert logits_BTV.grad is not None
    assert logits_BTV.grad[~mask_BT].eq(0).all()


def test_cross_entropy_is_float32_and_without_a_mask_counts_all() -> None:
    logits_BTV = torch.randn(2, 3, 5).bfloat16()
    summed, count = cross_entropy(logits_BTV, torch.zeros(2, 3, dtype=torch.long))
    assert summed.dtype == torch.float32
    assert count == 6


def test_a_bad_logit_where_nothing_counts_does_no_harm() -> None:
    logits_BTV = torch.zeros(1, 2, 4)
    logits_BTV[0, 1] = float("nan")
    mask_BT = torch.tensor([[True, False]])
    summed, _ = cross_entropy(logits_BTV, torch.zeros(1, 2, dtype=torch.long), mask_BT)
    assert summed.item() == pytest.approx(torch.tensor(4.0).log().item())


def routings(number: int, config: RouterConfig) -> tuple[Routing, ...]:
    made = []
    for _ in range(number):
        router = Router(6, 4, config)
        torch.nn.init.normal_(router.weight)
        made.append(router(torch.randn(24, 6), None, 8))
    return tuple(made)


def scene(mode: str, **options: Any) -> tuple[ModelOutput, ModelConfig]:
    torch.manual_seed(0)
    router = RouterConfig(mode=mode, balance_weight=0.5, z_weight=0.25, **options)
    config = ModelConfig(num_experts=4, router=router)
    output = ModelOutput(
        logits_BTV=torch.zeros(1, 1, 2),
        encoder_routing=routings(3, router),
        decoder_routing=routings(2, router),
    )
    return output, config


def test_paper_sums_over_layers_and_t5x_takes_the_mean() -> None:
    for mode, over_layers in (("paper", torch.sum), ("t5x", torch.mean)):
        output, config = scene(mode)
        balance, z_loss = routing_losses(output, config)
        layers = output.routing
        assert len(layers) == 5
        torch.testing.assert_close(
            balance, 0.5 * over_layers(torch.stack([r.balance_loss for r in layers]))
        )
        torch.testing.assert_close(
            z_loss, 0.25 * over_layers(torch.stack([r.z_loss for r in layers]))
        )


def test_hf_joins_the_layers_of_a_stack_before_it_multiplies() -> None:
    """As load_balancing_loss_func of transformers does with concatenated layers, a row a group."""
    output, config = scene("hf")
    balance, z_loss = routing_losses(output, config)
    expected = 0.0
    for stack in (output.encoder_routing, output.decoder_routing):
        f_GE = torch.stack([routing.fraction_GE for routing in stack]).mean(0)
        p_GE = torch.stack([routing.probability_GE for routing in stack]).mean(0)
        assert f_GE.shape == (3, 4), "rows of 8"
        expected = expected + (f_GE * p_GE).mean() * 4**2
    torch.testing.assert_close(balance, 0.5 * expected)
    expected_z = sum(
        torch.stack([r.z_loss for r in stack]).mean()
        for stack in (output.encoder_routing, output.decoder_routing)
    )
    torch.testing.assert_close(z_loss, 0.25 * expected_z)


@pytest.mark.parametrize("balance", ["bias", "none"])
def test_no_balance_loss_where_balance_needs_none(balance: str) -> None:
    output, config = scene("paper", balance=balance)
    loss, z_loss = routing_losses(output, config)
    assert loss == 0
    assert z_loss > 0


def test_a_dense_model_has_none() -> None:
    output = ModelOutput(logits_BTV=torch.zeros(1, 1, 2), encoder_routing=(), decoder_routing=())
    assert routing_losses(output, ModelConfig()) == (0, 0)


def test_a_loss_without_weight_costs_no_backward_pass() -> None:
    output, config = scene("paper")
    config = ModelConfig(num_experts=4, router=RouterConfig(balance_weight=0.5, z_weight=0.0))
    balance, z_loss = routing_losses(output, config)
    assert balance.requires_grad
    assert z_loss == 0
    assert not z_loss.requires_grad
