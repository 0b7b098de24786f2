"""Adafactor against transformers' implementation and against T5's rule."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor as Reference

from switchlm.training.adafactor import Adafactor, initial_state
from switchlm.training.config import TrainingConfig
from switchlm.training.optimizer import learning_rate


def parameters(*shapes: tuple[int, ...], scale: float = 0.3) -> list[nn.Parameter]:
    noise = torch.Generator().manual_seed(1)
    return [nn.Parameter(scale * torch.randn(shape, generator=noise)) for shape in shapes]


def gradients(step: int, like: list[nn.Parameter]) -> list[Tensor]:
    noise = torch.Generator().manual_seed(100 + step)
    return [torch.randn(p.shape, generator=noise) * 10 ** (step % 3 - 2) for p in like]


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: int = 7) -> None:
    for step in range(steps):
        for parameter, gradient in zip(params, gradients(step, params), strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()


@pytest.mark.parametrize("scale_by_parameter", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_it_equals_transformers(scale_by_parameter, weight_decay):
    mine = parameters((130, 140), (9,), (3, 128, 131))
    theirs = copy.deepcopy(mine)
    options = {"lr": 0.03, "weight_decay": weight_decay}
    run(Adafactor(mine, scale_by_parameter=scale_by_parameter, **options), mine)
    run(
        Reference(theirs, relative_step=False, scale_parameter=scale_by_parameter, **options),
        theirs,
    )
    for ours, reference in zip(mine, theirs, strict=True):
        torch.testing.assert_close(ours, reference, rtol=2e-5, atol=1e-6)


def test_the_relative_step_is_a_schedule():
    mine = parameters((130, 140), (9,))
    theirs = copy.deepcopy(mine)
    optimizer = Adafactor(mine)
    schedule = TrainingConfig(learning_rate=0.01, warmup_steps=0, decay_steps=10_000)
    reference = Reference(theirs, relative_step=True, scale_parameter=True, warmup_init=False)
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, schedule)
        for params in (mine, theirs):
            for parameter, gradient in zip(params, gradients(step, params), strict=True):
                parameter.grad = gradient.clone()
        optimizer.step()
        reference.step()
    for ours, expected in zip(mine, theirs, strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-5, atol=1e-6)


def test_small_matrices_keep_every_second_moment():
    """T5 factors only where both dims are at least 128: then the update is that of 1-D."""
    matrix = parameters((127, 200))
    flat = [nn.Parameter(matrix[0].detach().reshape(-1).clone())]
    run(Adafactor(matrix, lr=0.02), matrix)
    run(Adafactor(flat, lr=0.02), flat)
    assert torch.equal(matrix[0].reshape(-1), flat[0])


def test_experts_are_factored_one_by_one():
    state = initial_state(torch.empty(5, 128, 256), factor_from=128)
    assert state["row"].shape == (5, 128)
    assert state["column"].shape == (5, 256)
    assert "square" not in state
    # As many experts as rows change nothing: never over the expert dim.
    assert initial_state(torch.empty(512, 128, 256), 128)["row"].shape == (512, 128)


def test_per_expert_rms_treats_each_expert_as_a_matrix_of_its_own():
    stack = parameters((3, 130, 128))
    stack[0].data *= torch.tensor([1.0, 5.0, 0.1])[:, None, None]
    alone = [nn.Parameter(expert.clone()) for expert in stack[0].detach()]
    together = Adafactor(stack, lr=0.05, per_expert_rms=True)
    apart = Adafactor(alone, lr=0.05)
    for step in range(4):
        (gradient,) = gradients(step, stack)
        stack[0].grad = gradient.clone()
        for expert, parameter in enumerate(alone):
            parameter.grad = gradient[expert].clone()
        together.step()
        apart.step()
    torch.testing.assert_close(stack[0], torch.stack(list(alone)), rtol=1e-6, atol=1e-7)


def test_updates_are_clipped_to_a_root_mean_square_of_one():
    mine = parameters((64,))
    before = mine[0].detach().clone()
    optimizer = Adafactor(mine, lr=1.0, scale_by_parameter=False)
    for size in (1e-3, 1e3):  # the second gradient is far above what the first one made expected
        mine[0].grad = torch.full((64,), size)
        previous = mine[0].detach().clone()
        optimizer.step()
    assert (mine[0] - previous).abs().max() <= 1.0 + 1e-5
    assert not torch.equal(mine[0], before)


def test_found_inf_skips_without_a_trace():
    mine = parameters((130, 140), (9,))
    optimizer = Adafactor(mine, lr=0.1)
    run(optimizer, mine, steps=2)
    before = copy.deepcopy([p.detach() for p in mine])
    state = copy.deepcopy([optimizer.state[p] for p in mine])
    optimizer.found_inf = torch.tensor(1.0)
    for parameter in mine:
        parameter.grad = torch.full_like(parameter, torch.nan)
    optimizer.step()
    for parameter, old, old_state in zip(mine, before, state, strict=True):
        assert torch.equal(parameter, old)
        for name, tensor in optimizer.state[parameter].items():
            assert torch.equal(tensor, old_state[name]), name


def test_grad_scale_divides_the_gradients():
    one, other = parameters((130, 140)), parameters((130, 140))
    scaled, plain = Adafactor(one, lr=0.1), Adafactor(other, lr=0.1)
    scaled.grad_scale = torch.tensor(4.0)
    (gradient,) = gradients(0, one)
    one[0].grad, other[0].grad = gradient.clone(), gradient / 4
    scaled.step()
    plain.step()
    assert torch.equal(one[0], other[0])


def test_bfloat16_parameters_keep_float32_statistics():
    mine = [nn.Parameter(parameters((130, 140))[0].detach().bfloat16())]
    optimizer = Adafactor(mine, lr=0.05)
    run(optimizer, [mine[0]], steps=0)
    mine[0].grad = torch.randn(130, 140).bfloat16()
    before = mine[0].detach().clone()
    optimizer.step()
    assert optimizer.state[mine[0]]["row"].dtype == torch.float32
    assert not torch.equal(mine[0], before)
