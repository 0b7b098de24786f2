import math

import pytest
import torch

from switchlm.data.batch import Batch
from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import DataError
from switchlm.evaluation.evaluator import held_out_loss, target_bytes
from switchlm.model.losses import cross_entropy
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer, shift_right


@pytest.fixture
def model():
    torch.manual_seed(0)
    return SwitchTransformer(preset("nano"))


def make_batch(rows=4, source=(0, 1, 0, 1), padded=True, seed=1):
    generator = torch.Generator().manual_seed(seed)
    inputs_BS = torch.randint(3, 200, (rows, 12), generator=generator)
    targets_BT = torch.randint(3, 200, (rows, 6), generator=generator)
    segments = [torch.ones_like(ids, dtype=torch.int32) for ids in (inputs_BS, targets_BT)]
    if padded:
        segments[0][0, 8:] = 0
        segments[1][1, 3:] = 0
    return Batch(
        inputs_BS=inputs_BS,
        targets_BT=targets_BT,
        input_segments_BS=segments[0],
        target_segments_BT=segments[1],
        source_B=torch.tensor(source, dtype=torch.int32),
    )


def test_bits_per_byte_are_of_the_target_text_without_sentinels_end_and_padding(model):
    tokenizer = Tokenizer.bytes()
    texts = ["<extra_id_0> ab<extra_id_1>é", "<extra_id_0>京都"]
    ids = [[*tokenizer.encode(text), tokenizer.end_id] for text in texts]
    length = max(map(len, ids))
    rows = torch.tensor([row + [5] * (length - len(row)) for row in ids])
    segments = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids])
    batch = Batch(
        inputs_BS=rows,
        targets_BT=rows,
        input_segments_BS=segments,
        target_segments_BT=segments,
        source_B=torch.tensor([0, 1], dtype=torch.int32),
    )
    assert target_bytes(batch, tokenizer).tolist() == [len(" abé".encode()), len("京都".encode())]
    result = held_out_loss(model, [batch], ("a", "b"), tokenizer=tokenizer)
    nats = result["loss"] * result["tokens"]
    assert result["bits_per_byte"] == pytest.approx(nats / 11 / math.log(2))
    part = result["sources"]["b"]
    assert part["bits_per_byte"] == pytest.approx(part["loss"] * part["tokens"] / 6 / math.log(2))


def test_total_is_the_training_loss_per_token(model):
    batch = make_batch()
    result = held_out_loss(model, [batch], ("en", "de"))
    model.eval()
    inputs = shift_right(batch.targets_BT, batch.target_segments_BT, 0)
    output = model(batch.inputs_BS, inputs, batch.input_segments_BS, batch.target_segments_BT)
    total, count = cross_entropy(output.logits_BTV, batch.targets_BT, batch.target_mask_BT)
    assert result["loss"] == pytest.approx((total / count).item(), rel=1e-5)
    assert result["tokens"] == int(count) == 21


def test_total_is_the_token_weighted_mean_of_the_sources(model):
    result = held_out_loss(model, [make_batch(), make_batch(seed=2)], ("en", "de", "unused"))
    parts = result["sources"].values()
    assert set(result["sources"]) == {"en", "de"}
    assert sum(part["tokens"] for part in parts) == result["tokens"]
    weighted = sum(part["loss"] * part["tokens"] for part in parts)
    assert weighted / result["tokens"] == pytest.approx(result["loss"])
    assert result["sources"]["en"]["tokens"] == 24


def test_padding_does_not_count(model):
    batch = make_batch()
    changed = make_batch()
    changed.targets_BT[1, 3:] = 7
    assert held_out_loss(model, [batch], ("a", "b")) == held_out_loss(model, [changed], ("a", "b"))


def test_evaluation_has_no_exploration(model):
    model.train()
    batch = make_batch()
    assert held_out_loss(model, [batch], ("a", "b")) == held_out_loss(model, [batch], ("a", "b"))


def test_no_target_is_an_error(model):
    with pytest.raises(DataError, match="no held-out text"):
        held_out_loss(model, [], ("a",))


def test_the_interval_contains_the_loss_and_shrinks_with_rows(model):
    batches = [make_batch(seed=seed) for seed in range(12)]
    few = held_out_loss(model, batches[:2], ("en", "de"), resamples=400)
    many = held_out_loss(model, batches, ("en", "de"), resamples=400)
    widths = []
    for result in (few, many):
        for part in (result, *result["sources"].values()):
            low, high = part["interval"]
            assert low < part["loss"] < high
        widths.append(result["interval"][1] - result["interval"][0])
    assert widths[1] < widths[0] * 0.7
