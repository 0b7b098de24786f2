import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from switchlm.data.pretraining.rows import Pieces, pack, target_length_for
from switchlm.data.pretraining.span_corruption import Noise


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 60))
def test_every_piece_is_in_one_bin_and_no_bin_overflows(sizes, size):
    sizes = np.array(sizes, dtype=np.int64)
    order, first = pack(sizes, sizes, size, size)
    assert sorted(order.tolist()) == list(range(len(sizes)))
    assert all(0 < sizes[order[a:b]].sum() <= size for a, b in itertools.pairwise(first))


def test_packing_fills_bins_well():
    sizes = np.random.default_rng(0).integers(5, 60, size=2000)
    _, first = pack(sizes, sizes, 128, 128)
    assert sizes.sum() / (128 * (len(first) - 1)) > 0.99


@pytest.fixture
def packed(open_corpus):
    return open_corpus(input_length=128, pack=True, mean_span=2.0, held_out_share=0.0)


def examples_of(loader, batch):
    """Return (inputs, targets) of every example, as ids."""
    found = []
    for row in range(len(batch.inputs_BS)):
        for segment in range(1, int(batch.input_segments_BS[row].max()) + 1):
            found.append(
                (
                    batch.inputs_BS[row][batch.input_segments_BS[row] == segment].tolist(),
                    batch.targets_BT[row][batch.target_segments_BT[row] == segment].tolist(),
                )
            )
    return found


def restore(tokenizer, inputs, targets):
    """Undo the masking of one example; returns its text."""
    spans, current = {}, []
    for token in targets[:-1]:
        if token in tokenizer.sentinel_ids:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    ids = [piece for token in inputs[:-1] for piece in spans.get(token, [token])]
    assert inputs[-1] == targets[-1] == tokenizer.end_id
    return tokenizer.decode(ids)


def test_every_segment_is_one_document_or_a_part_and_none_is_lost(packed, corpus):
    longest = Noise(density=0.15, mean_span=2.0).raw_length(128)
    texts = {path.read_text(encoding="utf-8") for path in corpus.iterdir()}
    parts = {
        restore(packed.tokenizer, *example)
        for step in range(40)
        for example in examples_of(packed, packed.batch(step))
    }
    assert parts & texts == {text for text in texts if len(text) <= longest}
    for text in texts:
        rest = text
        while rest:
            begins = [part for part in parts if rest.startswith(part)]
            assert begins, "a part of the document was lost"
            rest = rest[len(max(begins, key=len)) :]
    assert all(any(part in text for text in texts) for part in parts)


def test_segments_are_numbered_from_one_and_padding_is_zero(packed):
    batch = packed.batch(3)
    for tokens, segments in (
        (batch.inputs_BS, batch.input_segments_BS),
        (batch.targets_BT, batch.target_segments_BT),
    ):
        assert segments.dtype == torch.int32
        assert (tokens[segments == 0] == packed.tokenizer.pad_id).all()
        for row in segments.tolist():
            real = [segment for segment in row if segment]
            assert real == sorted(real)
            assert set(real) == set(range(1, max(real) + 1))
            assert row[len(real) :] == [0] * (len(row) - len(real))
    assert (batch.input_segments_BS.amax(1) == batch.target_segments_BT.amax(1)).all()


def test_rows_of_short_documents_are_mostly_full(open_corpus, tmp_path):
    path = tmp_path / "short.jsonl"
    path.write_text("".join(f'{{"text": "{"word " * (n % 7 + 2)}{n}"}}\n' for n in range(2000)))
    loader = open_corpus(sources=(str(path),), input_length=512, pack=True)
    batch = loader.batch(0)
    assert (batch.input_segments_BS > 0).float().mean() > 0.9
    assert (batch.target_segments_BT > 0).float().mean() > 0.9


def test_the_mask_of_an_example_does_not_depend_on_its_neighbours(packed):
    whole = packed.batch(2)
    half = packed.share(1, 2).batch(2)
    assert torch.equal(whole.inputs_BS[4:], half.inputs_BS)


def test_targets_get_more_space_if_examples_are_short():
    noise = Noise(density=0.15, mean_span=3.0)
    long = Pieces(start_P=np.zeros(5, int), length_P=np.full(5, 568))
    short = Pieces(start_P=np.zeros(50, int), length_P=np.full(50, 10))
    assert target_length_for([long], noise, 512) == 120
    assert target_length_for([short], noise, 512) == 208


def test_documents_of_one_token_are_left_out(open_corpus, tmp_path):
    path = tmp_path / "short.jsonl"
    path.write_text('{"text": "a"}\n{"text": "bc"}\n{"text": "def"}\n' * 3)
    loader = open_corpus(sources=(str(path),), pack=True, held_out_share=0.0)
    found = {
        restore(loader.tokenizer, *example) for example in examples_of(loader, loader.batch(0))
    }
    assert found == {"bc", "def"}
