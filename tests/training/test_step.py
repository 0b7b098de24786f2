import copy
import dataclasses
import itertools

import pytest
import torch

from switchlm.data.batch import Batch
from switchlm.model.config import RouterConfig
from switchlm.model.losses import cross_entropy, routing_losses
from switchlm.model.router import Router
from switchlm.model.transformer import shift_right
from switchlm.training.config import TrainingConfig
from switchlm.training.optimizer import build_optimizer, optimizer_state, set_learning_rate
from switchlm.training.step import backward, seed_step, summarise_routing, training_step

QUIET = RouterConfig(
    capacity_factor=None,
    evaluation_capacity_factor=None,
    exploration="argmax",
    balance="none",
)


def joined(batches: list[Batch]) -> Batch:
    return Batch(
        **{
            field.name: torch.cat([getattr(batch, field.name) for batch in batches])
            for field in dataclasses.fields(Batch)
        }
    )


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_accumulation_equals_one_big_batch(build, loader):
    """Rows with different numbers of targets: the mean is over all of them, not of means."""
    batches = [loader.batch(0), loader.batch(1), loader.batch(2)]
    shorter = batches[1].target_segments_BT.clone()
    shorter[:, 2:] = 0
    batches[1] = dataclasses.replace(batches[1], target_segments_BT=shorter)
    parts, whole = build(router=QUIET), build(router=QUIET)
    losses, _ = backward(parts, batches)
    expected, _ = backward(whole, [joined(batches)])
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-7)
    found = gradients_of(parts)
    for name, gradient in gradients_of(whole).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def widened(batch: Batch, more: int) -> Batch:
    """Return the batch with that much more padding in every row."""
    pad = torch.nn.functional.pad
    values = {name: pad(value, (0, more)) for name, value in vars(batch).items() if name[-1] != "B"}
    return dataclasses.replace(batch, **values)


@pytest.mark.parametrize("mode", ["hf", "t5x", "paper"])
def test_padding_changes_neither_losses_nor_loads_nor_gradients(build, loader, mode):
    router = RouterConfig(
        mode=mode, exploration="argmax", expert_capacity=3, balance_weight=1.0, z_weight=0.1
    )
    plain, padded = build(router=router), build(router=router)
    losses, routing = backward(plain, [loader.batch(0)])
    assert summarise_routing(routing).dropped_L.max() > 0
    with_padding, its_routing = backward(padded, [widened(loader.batch(0), 50)])
    torch.testing.assert_close(with_padding, losses)
    summaries = [vars(summarise_routing(found)) for found in (routing, its_routing)]
    torch.testing.assert_close(summaries[1], summaries[0])
    torch.testing.assert_close(gradients_of(padded), gradients_of(plain), rtol=1e-4, atol=1e-6)


def test_routing_losses_are_means_over_micro_batches(build, loader):
    """Where rows are groups of their own, the balance loss of one big batch is that mean."""
    router = RouterConfig(mode="hf", exploration="argmax", balance_weight=0.1, z_weight=0.01)
    batches = [loader.batch(0), loader.batch(1)]
    model = build(router=router)
    losses, _ = backward(model, batches)
    separate = []
    for batch in batches:
        output = model(
            batch.inputs_BS,
            shift_right(batch.targets_BT, batch.target_segments_BT, 0),
            batch.input_segments_BS,
            batch.target_segments_BT,
        )
        separate.append(torch.stack(routing_losses(output, model.config)))
    torch.testing.assert_close(losses[1:], torch.stack(separate).mean(0))


def test_the_loss_is_the_mean_over_targets(build, loader):
    batch = loader.batch(0)
    model = build(router=QUIET)
    losses, _ = backward(model, [batch])
    logits = model(
        batch.inputs_BS,
        shift_right(batch.targets_BT, batch.target_segments_BT, 0),
        batch.input_segments_BS,
        batch.target_segments_BT,
    ).logits_BTV
    summed, count = cross_entropy(logits, batch.targets_BT, batch.target_mask_BT)
    torch.testing.assert_close(losses[0], summed / count)
    assert losses[1] == losses[2] == 0


def take_steps(build, loader, kind: str, spoil: int | None, leave_out: int | None, **changes):  # type: ignore[no-untyped-def]
    """Train 5 steps; step `spoil` meets a bad number, step `leave_out` does not happen."""
    model = build(**changes)
    optimizer = build_optimizer(model, TrainingConfig(optimizer=kind, weight_decay=0.01))
    records = []
    for step in range(5):
        if step == leave_out:
            continue
        set_learning_rate(optimizer, 0.01 / (step + 1))
        seed_step(0, step)
        if step == spoil:
            with bad_number(model, "encoder.blocks.1.feedforward.experts.up", expert=2):
                record = training_step(model, optimizer, [loader.batch(step)], gradient_clip=1.0)
        else:
            record = training_step(model, optimizer, [loader.batch(step)], gradient_clip=1.0)
        records.append(record)
    return model, optimizer, records


class bad_number:  # noqa: N801 (reads as a statement)
    """Puts one NaN into the gradient of one expert."""

    def __init__(self, model: torch.nn.Module, name: str, expert: int) -> None:
        self.parameter, self.expert = model.get_parameter(name), expert

    def __enter__(self) -> None:
        self.hook = self.parameter.register_hook(self.spoil)

    def spoil(self, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient[self.expert, 3, 1] = torch.nan
        return gradient

    def __exit__(self, *_: object) -> None:
        self.hook.remove()


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
@pytest.mark.parametrize("balance", ["loss", "bias"])
def test_a_step_with_a_bad_gradient_leaves_no_trace(build, loader, kind, balance):
    """T12: one NaN in one expert's gradient; the run equals one that never took the step."""
    router = RouterConfig(balance=balance)
    spoilt = take_steps(build, loader, kind, spoil=2, leave_out=None, router=router)
    spared = take_steps(build, loader, kind, spoil=None, leave_out=2, router=router)
    assert [bool(record.metrics[4]) for record in spoilt[2]] == [False, False, True, False, False]
    for (name, one), other in zip(
        spoilt[0].state_dict().items(), spared[0].state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name
    one_state, other_state = (optimizer_state(model, opt) for model, opt, _ in (spoilt, spared))
    for name, entry in one_state.items():
        for key, tensor in entry.items():
            assert torch.equal(tensor, other_state[name][key]), (name, key)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_loss_is_skipped_too(build, loader, value):
    model = build(router=RouterConfig(balance="bias"))
    optimizer = build_optimizer(model, TrainingConfig())
    set_learning_rate(optimizer, 0.01)
    with torch.no_grad():
        model.embedding.weight[5] = value
    before = copy.deepcopy(model.state_dict())
    record = training_step(model, optimizer, [loader.batch(0)])
    assert record.metrics[4] == 1
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(1.5), before[name].nan_to_num(1.5)), name


def test_seeds_differ_by_seed_and_step_and_repeat():
    drawn = {}
    for seed, step in itertools.product(range(8), range(50)):
        seed_step(seed, step)
        drawn[seed, step] = torch.rand(4).tolist()
    assert len({tuple(values) for values in drawn.values()}) == 400
    seed_step(3, 7)
    assert torch.rand(4).tolist() == drawn[3, 7]


def test_bias_balancing_evens_the_loads(build):
    """Frozen weights, lopsided routing: only the biases can even it out."""
    router = RouterConfig(
        balance="bias",
        exploration="argmax",
        capacity_factor=None,
        evaluation_capacity_factor=None,
    )
    model = build(router=router, vocabulary_size=512)
    with torch.no_grad():  # what all tokens have in common draws them to the same expert
        model.embedding.weight += torch.linspace(-1, 1, 16)
    optimizer = build_optimizer(model, TrainingConfig())
    set_learning_rate(optimizer, 0.0)
    batch = Batch(
        inputs_BS=torch.randint(2, 512, (16, 32)),
        targets_BT=torch.randint(2, 512, (16, 32)),
        input_segments_BS=None,
        target_segments_BT=None,
        source_B=torch.zeros(16, dtype=torch.int32),
    )

    def highest_load() -> float:
        """The load of the busiest expert as a multiple of the mean, mean over layers."""
        summary = summarise_routing(training_step(model, optimizer, [batch]).routing)
        return float(summary.load_LE.amax(1).mean() * summary.load_LE.shape[1])

    loads = [highest_load() for _ in range(40)]
    assert loads[0] > 1.5
    assert loads[-1] < 1.08


def test_biases_follow_the_layer_they_belong_to(build, loader):
    """Also in attention, where one block has several Switch layers."""
    router = RouterConfig(balance="bias", exploration="argmax")
    model = build(router=router, attention_experts=True)
    optimizer = build_optimizer(model, TrainingConfig())
    set_learning_rate(optimizer, 0.0)
    loads = {}
    for name, module in model.named_modules():
        if isinstance(module, Router):
            module.register_forward_hook(
                lambda _, __, routing, name=name: loads.update({name: routing.load_E})
            )
    training_step(model, optimizer, [loader.batch(0)])
    for name, load_E in loads.items():
        expected = 0.001 * (load_E.float().mean() - load_E).sign()
        assert torch.equal(model.get_submodule(name).bias_E, expected), name


def test_routing_summary_describes_the_step(build, loader):
    model = build(router=RouterConfig(capacity_factor=0.5, min_capacity=1))
    optimizer = build_optimizer(model, TrainingConfig())
    set_learning_rate(optimizer, 0.0)
    routing = training_step(model, optimizer, [loader.batch(0), loader.batch(1)]).routing
    summary = summarise_routing(routing)
    layers = list(zip(*routing, strict=True))
    assert summary.load_LE.shape == (2, 4)
    torch.testing.assert_close(summary.load_LE.sum(1), torch.ones(2))
    for layer, (one, two) in enumerate(layers):
        wanted = one.load_E + two.load_E
        torch.testing.assert_close(summary.load_LE[layer], wanted / wanted.sum())
        gates = torch.cat([part.gate_A[part.kept_A] for part in (one, two)])
        torch.testing.assert_close(summary.gate_L[layer], gates.mean())
        dropped = 1 - gates.numel() / wanted.sum()
        torch.testing.assert_close(summary.dropped_L[layer], dropped)
    assert (summary.dropped_L > 0.2).all()
    assert not summary.gate_L.requires_grad


def test_dense_models_have_no_routing_to_summarise(build, loader):
    model = build(num_experts=0)
    optimizer = build_optimizer(model, TrainingConfig())
    set_learning_rate(optimizer, 0.01)
    record = training_step(model, optimizer, [loader.batch(0)])
    assert summarise_routing(record.routing) is None
    assert record.metrics[1] == record.metrics[2] == 0


def test_a_dense_model_has_no_experts_to_balance(build, loader):
    model = build(num_experts=0, router=RouterConfig(balance="bias"))
    optimizer = build_optimizer(model, TrainingConfig())
    set_learning_rate(optimizer, 0.01)
    assert training_step(model, optimizer, [loader.batch(0)]).metrics[4] == 0
