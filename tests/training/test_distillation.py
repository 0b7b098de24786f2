"""Soft losses and their gradients against the definition; teachers and their loaders."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from switchlm.model.losses import cross_entropy
from switchlm.model.routing import ModelOutput
from switchlm.training.config import TrainingConfig
from switchlm.training.distillation import (
    Distillation,
    Teacher,
    TeacherBatch,
    TeacherLoader,
    soft_cross_entropy,
    top_soft_cross_entropy,
)
from switchlm.training.loop import train

B, T, V = 3, 5, 11


def logits(seed: int, scale: float = 3.0) -> Tensor:
    noise = torch.Generator().manual_seed(seed)
    return scale * torch.randn(B, T, V, generator=noise)


def top(expected_BTV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most likely tokens, their log-probabilities and that of all others, computed simply."""
    order = expected_BTV.argsort(-1, descending=True)
    words, rest = order[..., :k], order[..., k:]
    others = expected_BTV.gather(-1, rest).exp().sum(-1, keepdim=True).log()
    return words, torch.cat([expected_BTV.gather(-1, words), others], -1)


def test_the_soft_loss_is_its_definition():
    student, teacher = logits(0).double(), logits(1).double()
    q, p = student.softmax(-1), teacher.softmax(-1)
    expected = torch.zeros(B, T, dtype=torch.double)
    for word in range(V):
        expected -= p[..., word] * q[..., word].log()
    found = soft_cross_entropy(student.float(), teacher.log_softmax(-1).float())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_its_gradient_is_q_minus_p_and_vanishes_at_the_teacher():
    student = logits(0).requires_grad_()
    teacher = logits(1)
    soft_cross_entropy(student, teacher.log_softmax(-1)).sum().backward()
    torch.testing.assert_close(
        student.grad, student.detach().softmax(-1) - teacher.softmax(-1), rtol=1e-4, atol=1e-6
    )
    same = teacher.clone().requires_grad_()
    loss = soft_cross_entropy(same, teacher.log_softmax(-1))
    loss.sum().backward()
    assert same.grad is not None
    assert same.grad.abs().max() < 1e-6
    entropy = torch.distributions.Categorical(logits=teacher).entropy()
    torch.testing.assert_close(loss.detach(), entropy, rtol=1e-5, atol=1e-6)


def test_a_teacher_that_is_sure_gives_the_hard_loss():
    targets = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(2))
    sure = torch.full((B, T, V), -torch.inf).scatter(-1, targets[..., None], 0.0)
    words, expected = top(sure, 2)
    found = top_soft_cross_entropy(logits(0), words, expected).sum()
    torch.testing.assert_close(found, cross_entropy(logits(0), targets)[0])


def test_with_all_words_the_top_form_is_the_full_form_gradients_too():
    teacher = logits(1).log_softmax(-1)
    full, some = (logits(0).requires_grad_() for _ in range(2))
    one = soft_cross_entropy(full, teacher)
    two = top_soft_cross_entropy(some, *top(teacher, V))
    torch.testing.assert_close(one, two)
    one.sum().backward()
    two.sum().backward()
    torch.testing.assert_close(full.grad, some.grad)


@pytest.mark.parametrize("k", [1, 4, V - 1])
def test_the_other_words_count_as_one(k):
    """Against the full loss over k + 1 classes, the last being all other words together."""
    teacher, student = logits(1).log_softmax(-1), logits(0).requires_grad_()
    words, expected = top(teacher, k)
    found = top_soft_cross_entropy(student, words, expected)
    oracle = logits(0).double().requires_grad_()
    q = oracle.softmax(-1)
    q_words = q.gather(-1, words)
    merged = torch.cat([q_words, 1 - q_words.sum(-1, keepdim=True)], -1)
    wanted = -(expected.double().exp() * merged.log()).sum(-1)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
    found.sum().backward()
    wanted.sum().backward()
    torch.testing.assert_close(student.grad.double(), oracle.grad, rtol=1e-3, atol=1e-5)
    assert (found <= soft_cross_entropy(logits(0), teacher) + 1e-5).all()


def test_unlikely_others_stay_finite():
    """The student is so sure that the others' share rounds to nothing."""
    student = torch.zeros(1, 1, V)
    student[..., 0] = 200.0
    student.requires_grad_()
    teacher = torch.zeros(1, 1, V).log_softmax(-1)
    loss = top_soft_cross_entropy(student, *top(teacher, 3))
    loss.sum().backward()
    assert 150 < float(loss.detach()) < 250
    assert torch.isfinite(student.grad).all()


def output_of(logits_BTV: Tensor) -> ModelOutput:
    return ModelOutput(logits_BTV=logits_BTV, encoder_routing=(), decoder_routing=())


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_objective_weighs_hard_and_soft_over_real_targets(build, loader, temperature):
    model, batch = build(), loader.batch(0)
    assert not batch.target_mask_BT.all()
    with_teacher = Teacher(model, temperature=temperature)(batch)
    shape = (*batch.targets_BT.shape, model.config.vocabulary_size)
    student = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    objective = Distillation(hard_weight=0.7, soft_weight=0.2, temperature=temperature)
    found = objective(output_of(student), with_teacher)
    hard, _ = cross_entropy(student, batch.targets_BT, batch.target_mask_BT)
    p = with_teacher.log_probs_BTK.exp()
    soft_BT = -(p * (student / temperature).softmax(-1).log()).sum(-1)
    soft = soft_BT[batch.target_mask_BT].sum()
    torch.testing.assert_close(found, 0.7 * hard + 0.2 * soft * temperature**2)


def test_the_size_of_gradients_does_not_depend_much_on_the_temperature():
    """Why the soft part is multiplied by its square (Hinton et al. 2015)."""
    sizes = []
    for temperature in (4.0, 8.0):
        student, teacher = logits(0, 0.1).requires_grad_(), logits(1, 0.1)
        expected = (teacher / temperature).log_softmax(-1)
        loss = soft_cross_entropy(student / temperature, expected).sum() * temperature**2
        loss.backward()
        sizes.append(float(student.grad.norm()))
    assert math.isclose(*sizes, rel_tol=0.05)


def test_a_teacher_runs_in_eval_mode_and_is_not_changed(build, loader):
    model = build(dropout=0.5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = loader.batch(0)
    with_teacher = Teacher(model)(batch)
    again = Teacher(model)(batch)
    torch.testing.assert_close(with_teacher.log_probs_BTK, again.log_probs_BTK, rtol=0, atol=0)
    assert not with_teacher.log_probs_BTK.requires_grad
    torch.testing.assert_close(with_teacher.log_probs_BTK.exp().sum(-1), torch.ones(8, 6))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("k", [1, 5, 24])
def test_top_k_of_a_teacher_agrees_with_all_tokens(build, loader, k):
    model, batch = build(), loader.batch(0)
    full, some = Teacher(model)(batch), Teacher(model, top_k=k)(batch)
    assert some.token_ids_BTK is not None
    assert full.token_ids_BTK is None
    words, expected = top(full.log_probs_BTK, k)
    torch.testing.assert_close(some.log_probs_BTK, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(some.token_ids_BTK.sort(-1)[0], words.sort(-1)[0])


def test_a_teacher_loader_starts_at_any_step_and_leaves_held_out_batches(build, loader):
    teacher = Teacher(build())
    source = TeacherLoader(loader, lambda number, batch: teacher(batch))
    batches = source.iterate(7)
    number, batch = next(batches)
    batches.close()
    assert number == 7
    assert isinstance(batch, TeacherBatch)
    assert torch.equal(batch.inputs_BS, loader.batch(7).inputs_BS)
    assert not any(isinstance(one, TeacherBatch) for one in source.held_out(2))
    assert source.sources == loader.sources


@pytest.mark.parametrize("top_k", [None, 4])
def test_a_student_learns_from_soft_targets_alone(build, loader, top_k):
    config = TrainingConfig(steps=60, learning_rate=0.02, warmup_steps=10, evaluate_batches=2)
    model = build()
    first, *_, last = [line["loss"] for line in train(model, loader, with_lines(config))
                       if "loss" in line]  # fmt: skip
    assert last < 0.7 * first
    teacher = Teacher(model, top_k=top_k)
    source = TeacherLoader(loader, lambda number, batch: teacher(batch))
    student = build(seed=1, num_experts=0)
    objective = Distillation(hard_weight=0.0, soft_weight=1.0)
    held_out = [
        line["evaluation_loss"]
        for line in train(student, source, with_lines(config), objective=objective)
        if "evaluation_loss" in line
    ]
    assert held_out[-1] < 0.7 * held_out[0]


def with_lines(config: TrainingConfig) -> TrainingConfig:
    return dataclasses.replace(config, log_every=6, evaluate_every=6)
