"""Selective precision: bfloat16 outside the router, float32 inside (section 2.4, Table 2)."""

import dataclasses

import pytest
import torch

from switchlm.model import router as router_module
from switchlm.model.precision import in_float32, set_precision
from switchlm.model.router import Router
from switchlm.model.transformer import forward_batch
from switchlm.training.config import TrainingConfig
from switchlm.training.optimizer import build_optimizer, set_learning_rate
from switchlm.training.step import seed_step, training_step


@pytest.mark.parametrize(
    ("precision", "router", "experts"),
    [
        ("float32", torch.float32, torch.float32),
        ("selective", torch.float32, torch.bfloat16),
        ("bfloat16", torch.bfloat16, torch.bfloat16),
    ],
)
def test_what_runs_in_which_dtype(build, loader, monkeypatch, precision, router, experts):
    model = build()
    set_precision(model, precision)
    seen: dict[str, set[torch.dtype]] = {"router": set(), "experts": set()}
    linear, (native,) = router_module.linear, router_module.ROUTE
    weights = {(module.num_experts, 16) for module in model.modules() if isinstance(module, Router)}

    def spy(x, weight):  # type: ignore[no-untyped-def]
        if tuple(weight.shape) in weights:
            seen["router"].add(x.dtype)
        return linear(x, weight)

    def fused_spy(x_ND, *arguments):  # type: ignore[no-untyped-def]
        seen["router"].add(x_ND.dtype)
        return native.run(x_ND, *arguments)

    monkeypatch.setattr(router_module, "linear", spy)
    monkeypatch.setattr(router_module, "ROUTE", (dataclasses.replace(native, run=fused_spy),))
    for module in model.modules():
        if type(module).__name__ == "FeedForwardExperts":
            module.register_forward_hook(lambda _, args, y: seen["experts"].add(args[0].dtype))
    forward_batch(model, loader.batch(0))
    assert seen == {"router": {router}, "experts": {experts}}
    seen["router"].clear(), seen["experts"].clear()
    with in_float32(model):
        forward_batch(model, loader.batch(0))
    assert seen == {"router": {torch.float32}, "experts": {torch.float32}}
    assert model.precision == precision


@pytest.mark.parametrize("precision", ["float32", "selective", "bfloat16"])
def test_every_precision_trains(build, loader, precision):
    model = build()
    set_precision(model, precision)
    optimizer = build_optimizer(model, TrainingConfig())
    losses = []
    for step in range(60):
        set_learning_rate(optimizer, 0.01)
        seed_step(0, step)
        batch = [loader.batch(step)]
        record = training_step(model, optimizer, batch, gradient_clip=1.0)
        losses.append(float(record.metrics[0]))
        assert record.metrics[4] == 0
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_selective_precision_routes_as_float32_does(build, loader):
    """On the same activations its choice is float32's; the bfloat16 router's logits are rounded."""
    router = build().encoder.blocks[1].feedforward.router
    x_ND = torch.randn(512, 16)
    router.eval()
    exact = router(x_ND.bfloat16().float(), None, row_tokens=512)
    selective = router(x_ND.bfloat16(), None, row_tokens=512)
    assert torch.equal(selective.gate_A, exact.gate_A)
    router.dtype = torch.bfloat16
    rounded = router(x_ND.bfloat16(), None, row_tokens=512)
    assert not torch.equal(rounded.probability_GE, exact.probability_GE)
