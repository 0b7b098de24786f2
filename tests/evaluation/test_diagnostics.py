"""Diagnostics against transformers, against loops, and on cases with a known result."""

import dataclasses
import math

import pytest
import torch

from switchlm.data.batch import Batch
from switchlm.data.text.tokenizer import Tokenizer
from switchlm.evaluation.diagnostics import (
    MAX_SAMPLED,
    MAX_TOKENS,
    NEAR,
    diagnose,
    entropy,
    kept_share,
)
from switchlm.evaluation.routing import routing_statistics
from switchlm.huggingface.load import save
from switchlm.model.presets import preset
from switchlm.model.switch import switch_layers
from switchlm.model.transformer import SwitchTransformer, shift_right


def build(name="nano", router=None, **changes):
    torch.manual_seed(0)
    config = dataclasses.replace(preset(name), **changes)
    config = dataclasses.replace(
        config, router=dataclasses.replace(config.router, **(router or {}))
    )
    return SwitchTransformer(config)


def make_batch(rows=4, source=12, target=8, segments="padded", seed=1):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, source), (rows, target))
    tokens = [torch.randint(3, 200, shape, generator=generator) for shape in shapes]
    marks = [torch.ones_like(ids, dtype=torch.int32) for ids in tokens]
    if segments == "padded":
        marks[0][0, 8:] = 0
        marks[1][1, 3:] = 0
    if segments == "packed":
        for mark in marks:
            mark[:, mark.shape[1] // 2 :] = 2
            mark[0, -2:] = 0
    full = segments == "full"
    return Batch(
        inputs_BS=tokens[0],
        targets_BT=tokens[1],
        input_segments_BS=None if full else marks[0],
        target_segments_BT=None if full else marks[1],
        source_B=torch.zeros(rows, dtype=torch.int32),
    )


def near_by_loops(weights_BHQM, segments_BS):
    """Sum the near weights of every real query, one by one."""
    num_heads = weights_BHQM.shape[1]
    total_H, count = torch.zeros(num_heads, dtype=torch.float64), 0
    for row, marks in enumerate(segments_BS.tolist()):
        for query, mark in enumerate(marks):
            if not mark:
                continue
            count += 1
            for key in range(len(marks)):
                if -NEAR <= key - query <= NEAR:
                    total_H += weights_BHQM[row, :, query, key].double()
    return (total_H / count).tolist()


@pytest.mark.parametrize("segments", ["full", "padded"])
@pytest.mark.parametrize("name", ["dense-nano", "nano"])
def test_near_attention_is_that_of_transformers(tmp_path, name, segments):
    """Attention weights of transformers, summed by loops; it supports padding, not packing."""
    transformers = pytest.importorskip("transformers")
    router = {"mode": "hf", "expert_capacity": 64}
    model = build(name, router, num_encoder_layers=3, num_decoder_layers=3).eval()
    save(model, Tokenizer.bytes(), tmp_path)
    their = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.float32
    ).eval()
    batch = make_batch(segments=segments)
    marks = [
        torch.ones_like(tokens) if part is None else part
        for tokens, part in (
            (batch.inputs_BS, batch.input_segments_BS),
            (batch.targets_BT, batch.target_segments_BT),
        )
    ]
    with torch.no_grad():
        output = their(
            input_ids=batch.inputs_BS,
            attention_mask=marks[0],
            decoder_input_ids=shift_right(batch.targets_BT, batch.target_segments_BT, 0),
            output_attentions=True,
        )
    expected = {}
    for stack, weights, part in (
        ("encoder", output.encoder_attentions, marks[0]),
        ("decoder", output.decoder_attentions, marks[1]),
    ):
        for layer, weights_BHQM in enumerate(weights):
            expected[f"{stack}.blocks.{layer}.attention"] = near_by_loops(weights_BHQM, part)
    found = diagnose(model, batch).attention_near
    assert found.keys() == expected.keys()
    for place, near_H in expected.items():
        assert found[place] == pytest.approx(near_H, abs=2e-5), place
        assert all(0.05 < near < 1 for near in near_H), "a test of nothing"


def test_packed_examples_have_the_metrics_of_separate_rows():
    """Two examples in one row, and the same two in separate rows."""
    packed = make_batch(rows=1, source=12, target=8, segments="packed")
    marks = {"input": packed.input_segments_BS, "target": packed.target_segments_BT}
    alone = Batch(
        inputs_BS=torch.cat([packed.inputs_BS[:, :6], packed.inputs_BS[:, 6:]]),
        targets_BT=torch.cat([packed.targets_BT[:, :4], packed.targets_BT[:, 4:]]),
        input_segments_BS=torch.cat([marks["input"][:, :6], marks["input"][:, 6:]]).clamp(max=1),
        target_segments_BT=torch.cat([marks["target"][:, :4], marks["target"][:, 4:]]).clamp(max=1),
        source_B=torch.zeros(2, dtype=torch.int32),
    )
    dropless = {"capacity_factor": None, "evaluation_capacity_factor": None}
    model = build(router=dropless)
    one, other = diagnose(model, packed), diagnose(model, alone)
    for name, near_H in one.attention_near.items():
        assert other.attention_near[name] == pytest.approx(near_H, abs=1e-5)
    for ours, theirs in zip(one.layers, other.layers, strict=True):
        assert ours.router_entropy == pytest.approx(theirs.router_entropy, abs=1e-5)
        assert ours.expert_T.tolist() == theirs.expert_T.tolist()


ROUTERS = {
    "paper": {},
    "dropping": {"evaluation_capacity_factor": 0.5, "min_capacity": 1},
    "hf": {"mode": "hf", "expert_capacity": 64},
    "expert choice": {"selection": "expert_choice", "min_capacity": 1},
    "top 2": {"experts_per_token": 2},
}


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS.keys())
@pytest.mark.parametrize("attention_experts", [False, True])
def test_loads_and_gates_are_those_of_the_models_own_forward_pass(router, attention_experts):
    """The routing of the last layer depends on all blocks before it."""
    model = build(router=router, attention_experts=attention_experts, num_decoder_layers=4)
    batch = make_batch(segments="packed")
    found = diagnose(model, batch)
    assert [layer.name for layer in found.layers] == list(switch_layers(model))
    counted = routing_statistics(model, [batch], Tokenizer.bytes())
    for layer, expected in zip(found.layers, counted, strict=True):
        load_E = expected.load_E
        shares = [load / sum(load_E) for load in load_E if load]
        assert layer.dead_experts == load_E.count(0)
        assert layer.load_entropy == pytest.approx(-sum(p * math.log(p) for p in shares))
        assert layer.router_entropy <= math.log(len(load_E)) + 1e-6
        if router == {}:
            tokens = torch.bincount(layer.expert_T, minlength=len(load_E)).tolist()
            assert tokens == list(load_E), "the sample is of all tokens here"
    batch = make_batch(segments="full")
    model.eval()
    inputs = shift_right(batch.targets_BT, None, 0)
    routing = model(batch.inputs_BS, inputs).routing
    for layer, one in zip(diagnose(model, batch).layers, routing, strict=True):
        gate = one.gate_A[one.kept_A].mean().item()
        assert layer.gate == pytest.approx(gate, rel=1e-5)


def test_entropy_of_the_router_is_that_of_its_probabilities():
    """One Switch layer, first in the encoder, whose input is easy to compute."""
    model = build("tiny").eval()
    batch = make_batch()
    block, real_BS = model.encoder.blocks[0], batch.input_segments_BS != 0
    inputs = model.encoder_inputs(batch.inputs_BS, batch.input_segments_BS)
    y_BSD, _ = block.attention(block.attention_norm(inputs.x_BSD), inputs.bias)
    x_BSD = block.feedforward_norm(inputs.x_BSD + y_BSD)
    total = []
    for row, column in real_BS.nonzero().tolist():
        p_E = (block.feedforward.router.weight @ x_BSD[row, column]).softmax(0).tolist()
        total.append(-sum(p * math.log(p) for p in p_E if p))
    layer = diagnose(model, batch).layers[0]
    assert layer.router_entropy == pytest.approx(sum(total) / len(total), rel=1e-5)
    assert 0.5 < layer.router_entropy < math.log(64) - 0.5


def test_a_router_of_zeros_has_equal_probabilities_and_chooses_one_expert():
    model = build()
    for layer in (model.encoder.blocks[1], model.decoder.blocks[1]):
        torch.nn.init.zeros_(layer.feedforward.router.weight)
    for layer in diagnose(model, make_batch()).layers:
        assert layer.router_entropy == pytest.approx(math.log(4))
        assert layer.load_entropy == 0
        assert layer.dead_experts == 3
        assert layer.gate == pytest.approx(0.25)
        assert set(layer.expert_T.tolist()) == {0}


def test_an_expert_that_is_never_chosen_is_dead():
    model = build(router={"balance": "bias"})
    before = diagnose(model, make_batch())
    bias_E = model.encoder.blocks[1].feedforward.router.bias_E
    bias_E[2] = -10
    after = diagnose(model, make_batch())
    assert (before.layers[0].dead_experts, after.layers[0].dead_experts) == (0, 1)
    kept = after.metrics(before.experts())["kept_expert"]
    stayed = (before.layers[0].expert_T != 2).double().mean().item()
    assert kept[0] == pytest.approx(stayed)
    assert 0 < stayed < 1


def test_padding_is_not_counted():
    batch = make_batch()
    changed = dataclasses.replace(
        batch, inputs_BS=batch.inputs_BS.clone(), targets_BT=batch.targets_BT.clone()
    )
    changed.inputs_BS[0, 8:] = 7
    changed.targets_BT[1, 3:] = 7
    model = build()
    assert diagnose(model, batch).metrics({}) == diagnose(model, changed).metrics({})


def test_dense_models_have_attention_metrics_only():
    figures = diagnose(build("dense-nano"), make_batch()).metrics({})
    assert figures.keys() == {"attention_near"}
    assert len(figures["attention_near"]) == 4


def test_model_and_random_state_are_not_changed():
    model = build(dropout=0.1, expert_dropout=0.1, router={"balance": "bias"})
    model.train()
    model.encoder.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.get_rng_state()
    batch = make_batch()
    first = diagnose(model, batch)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert diagnose(model, batch).metrics({}) == first.metrics({})


def test_the_sample_and_the_rows_are_bounded():
    model = build()
    batch = make_batch(rows=2 * MAX_TOKENS // 128, source=128, target=16, segments="full")
    rows = MAX_TOKENS // 128
    first = Batch(
        **{name: part if part is None else part[:rows] for name, part in vars(batch).items()}
    )
    large, small = diagnose(model, batch), diagnose(model, first)
    assert large.metrics({}) == small.metrics({})
    assert [len(layer.expert_T) for layer in large.layers] == [MAX_SAMPLED, MAX_SAMPLED]


@pytest.mark.parametrize(
    ("now", "before", "share"),
    [
        ([0, 1, 2, 3], [0, 1, 3, 3], 0.75),
        ([1], [0], 0.0),
        ([0, 1], None, None),
        ([0], [0, 1], None),
    ],
)
def test_kept_share(now, before, share):
    assert kept_share(now, before) == share


def test_entropy_with_zeros():
    assert entropy(torch.tensor([0.5, 0.5, 0.0])).item() == pytest.approx(math.log(2))
