import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from switchlm.model.config import Initialisation, ModelConfig, RouterConfig
from switchlm.model.losses import cross_entropy, routing_losses
from switchlm.model.transformer import SwitchTransformer, shift_right

DROPLESS = RouterConfig(capacity_factor=None, evaluation_capacity_factor=None, exploration="argmax")
SMALL = ModelConfig(
    vocabulary_size=40,
    d_model=16,
    d_ff=24,
    d_kv=8,
    num_heads=2,
    num_encoder_layers=2,
    num_decoder_layers=2,
    num_experts=3,
    initialisation=Initialisation(scale=1.0),
    router=DROPLESS,
)


def build(seed: int = 0, **changes: Any) -> SwitchTransformer:
    torch.manual_seed(seed)
    model = SwitchTransformer(dataclasses.replace(SMALL, **changes))
    for name, parameter in model.named_parameters():
        if name.endswith("router.weight"):
            torch.nn.init.normal_(parameter)
    return model


def loss_of(model: SwitchTransformer, *inputs: Tensor | None) -> Tensor:
    output = model(*inputs)
    summed, count = cross_entropy(output.logits_BTV, inputs[1])
    balance, z_loss = routing_losses(output, model.config)
    return summed / count + balance + z_loss


def segments_of(lengths: list[int], total: int) -> list[int]:
    row = [n + 1 for n, length in enumerate(lengths) for _ in range(length)]
    return (row + [0] * total)[:total]


@given(
    st.lists(st.integers(1, 5), min_size=2, max_size=3),
    st.lists(st.integers(1, 4), min_size=3, max_size=3),
    st.booleans(),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_packed_examples_do_not_see_one_another(
    inputs: list[int], targets: list[int], training: bool, attention_experts: bool, seed: int
) -> None:
    """Changing one example leaves the logits of the others, in training and in evaluation."""
    model = build(seed, attention_experts=attention_experts, sparse_step=1).train(training)
    source_segments = torch.tensor([segments_of(inputs, 16), segments_of([9], 16)])
    target_segments = torch.tensor([segments_of(targets[: len(inputs)], 12), segments_of([5], 12)])
    inputs_BS = torch.randint(2, 40, (2, 16))
    targets_BT = torch.randint(2, 40, (2, 12))

    def logits(changed: bool) -> Tensor:
        source, target = inputs_BS.clone(), targets_BT.clone()
        if changed:
            for tokens, segments in ((source, source_segments), (target, target_segments)):
                picked = segments == 2
                picked[1] = False
                tokens[picked] = (tokens[picked] + 7) % 38 + 2
                # The tokens in padding have no effect.
                tokens[segments == 0] = 33
        shifted = shift_right(target, target_segments, 0)
        return model(source, shifted, source_segments, target_segments).logits_BTV

    before, after = logits(False), logits(True)
    others = (target_segments != 2) & (target_segments != 0)
    others[1] = target_segments[1] != 0
    torch.testing.assert_close(before[others], after[others], rtol=1e-5, atol=1e-5)
    second = target_segments == 2
    second[1] = False
    assert not torch.allclose(before[second], after[second], atol=1e-3)


def test_a_packed_row_equals_its_examples_alone() -> None:
    model = build(sparse_step=1)
    parts = [
        (torch.randint(2, 40, (1, s)), torch.randint(2, 40, (1, t))) for s, t in ((5, 3), (7, 4))
    ]
    alone = [model(s, shift_right(t, None, 0)).logits_BTV for s, t in parts]
    source, target = (torch.cat(tensors, 1) for tensors in zip(*parts, strict=True))
    source_segments = torch.tensor([segments_of([5, 7], 12)])
    target_segments = torch.tensor([segments_of([3, 4], 7)])
    shifted = shift_right(target, target_segments, 0)
    packed = model(source, shifted, source_segments, target_segments).logits_BTV
    # By relative positions an example gives the same anywhere in the row.
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-4, atol=1e-5)


def test_one_segment_a_row_without_target_segments() -> None:
    """As in generation: inputs are padded, targets are not."""
    model = build()
    source = torch.randint(2, 40, (2, 8))
    target = torch.randint(2, 40, (2, 3))
    segments = torch.tensor([segments_of([8], 8), segments_of([5], 8)])
    padded = model(source, target, segments).logits_BTV
    short = model(source[1:, :5], target[1:]).logits_BTV
    torch.testing.assert_close(padded[1:], short, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["paper", "t5x", "hf"])
@pytest.mark.parametrize("exact", ["dropless", "capacity"])
def test_rows_of_nothing_but_padding_are_finite(precision: str, mode: str, exact: str) -> None:
    router = (
        RouterConfig(mode=mode) if exact == "capacity" else dataclasses.replace(DROPLESS, mode=mode)
    )
    model = build(router=router)
    source, target = torch.randint(2, 40, (3, 8)), torch.randint(2, 40, (3, 6))
    source_segments = torch.tensor([segments_of([8], 8), segments_of([2], 8), [0] * 8])
    target_segments = torch.tensor([segments_of([6], 6), [0] * 6, [0] * 6])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        output = model(source, target, source_segments, target_segments)
    assert torch.isfinite(output.logits_BTV).all()
    mask_BT = target_segments != 0
    summed, _ = cross_entropy(output.logits_BTV, target, mask_BT)
    balance, z_loss = routing_losses(output, model.config)
    (summed + balance + z_loss).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) == len(list(model.parameters()))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_the_decoder_is_causal() -> None:
    model = build(sparse_step=1)
    source, target = torch.randint(2, 40, (2, 8)), torch.randint(2, 40, (2, 6))
    before = model(source, target).logits_BTV
    target[:, 4] = (target[:, 4] + 3) % 38 + 2
    after = model(source, target).logits_BTV
    torch.testing.assert_close(before[:, :4], after[:, :4], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(before[:, 4:], after[:, 4:], atol=1e-3)


def test_the_decoder_stays_causal_where_experts_choose_in_the_encoder() -> None:
    router = RouterConfig(selection="expert_choice", exploration="argmax", expert_capacity=64)
    model = build(router=router, sparse_step=1)
    source, target = torch.randint(2, 40, (2, 8)), torch.randint(2, 40, (2, 6))
    output = model(source, target)
    assert all(routing.token_A is not None for routing in output.encoder_routing)
    assert all(routing.token_A is None for routing in output.decoder_routing)
    target[:, 5] += 1
    after = model(source, target).logits_BTV
    torch.testing.assert_close(output.logits_BTV[:, :5], after[:, :5], rtol=1e-5, atol=1e-6)


def test_routing_comes_in_layer_order_and_covers_the_tokens() -> None:
    model = build(sparse_step=1, attention_experts=True)
    output = model(torch.randint(2, 40, (2, 8)), torch.randint(2, 40, (2, 6)))
    # Queries, keys, feed-forward: three Switch layers per block.
    assert len(output.encoder_routing) == len(output.decoder_routing) == 6
    assert output.routing == output.encoder_routing + output.decoder_routing
    assert [r.load_E.sum().item() for r in output.routing] == [16] * 6 + [12] * 6
    model = build()
    output = model(torch.randint(2, 40, (2, 8)), torch.randint(2, 40, (2, 6)))
    assert len(output.encoder_routing) == len(output.decoder_routing) == 1


@pytest.mark.parametrize("exploration", ["jitter", "sample"])
def test_activation_checkpointing_gives_equal_gradients(exploration: str) -> None:
    router = RouterConfig(exploration=exploration, exploration_rate=0.3, z_weight=0.1)
    model = build(router=router, dropout=0.2, expert_dropout=0.3, sparse_step=1)
    source, target = torch.randint(2, 40, (3, 8)), torch.randint(2, 40, (3, 6))
    segments = torch.ones(3, 8), torch.ones(3, 6)
    results = []
    for recompute in (False, True):
        model.encoder.activation_checkpointing = recompute
        model.decoder.activation_checkpointing = recompute
        model.zero_grad()
        torch.manual_seed(3)
        loss = loss_of(model, source, target, *segments)
        loss.backward()
        results.append([loss, *(parameter.grad for parameter in model.parameters())])
    for mine, other in zip(*results, strict=True):
        assert torch.equal(mine, other)


def test_the_tied_head_is_the_embedding_scaled_down() -> None:
    model = build()
    assert model.head is None
    hidden_BTD = torch.randn(1, 2, 16)
    expected = hidden_BTD @ model.embedding.weight.T / 4
    torch.testing.assert_close(model.logits(hidden_BTD), expected)
    untied = build(tied_head=False)
    assert untied.head is not None
    torch.testing.assert_close(untied.logits(hidden_BTD), hidden_BTD @ untied.head.weight.T)


def test_dropout_acts_in_training_only() -> None:
    model = build(dropout=0.5)
    inputs = torch.randint(2, 40, (2, 8)), torch.randint(2, 40, (2, 6))
    assert not torch.equal(model(*inputs).logits_BTV, model(*inputs).logits_BTV)
    model.eval()
    assert torch.equal(model(*inputs).logits_BTV, model(*inputs).logits_BTV)


def test_it_learns_to_copy() -> None:
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        source = torch.randint(2, 8, (16, 4))
        output = model(source, shift_right(source, None, 0))
        summed, count = cross_entropy(output.logits_BTV, source)
        loss = summed / count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize(
    ("segments", "expected"),
    [
        (None, [0, 5, 6, 7, 8]),
        ([1, 1, 1, 1, 1], [0, 5, 6, 7, 8]),
        ([1, 1, 2, 2, 2], [0, 5, 0, 7, 8]),
        ([1, 2, 2, 0, 0], [0, 0, 6, 0, 0]),
    ],
)
def test_shift_right_leads_every_segment_with_the_pad_token(
    segments: list[int] | None, expected: list[int]
) -> None:
    targets_BT = torch.tensor([[5, 6, 7, 8, 9]])
    segments_BT = None if segments is None else torch.tensor([segments])
    shifted = shift_right(targets_BT, segments_BT, 0)[0]
    real = [True] * 5 if segments is None else [segment != 0 for segment in segments]
    assert [int(t) for t, r in zip(shifted, real, strict=True) if r] == [
        t for t, r in zip(expected, real, strict=True) if r
    ]
