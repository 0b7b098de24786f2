"""Ids that begin and end outputs, and generation_config.json, mean what they do in transformers."""

import json
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from switchlm.data.batch import Batch
from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import CheckpointError, DataError
from switchlm.evaluation.evaluator import held_out_loss
from switchlm.generation.beam import Beams, beam_search
from switchlm.generation.decode import before_end, evaluation_mode, generate
from switchlm.generation.sampling import GREEDY
from switchlm.generation.slots import Slots
from switchlm.huggingface.load import load, load_tokenizer, save
from switchlm.huggingface.metadata import unused_settings

PROMPTS = torch.tensor([[7, 30, 12, 9, 2], [40, 3, 25, 11, 2]])
LENGTH = 8
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "MADLAD-400": ({"pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}, None),
    "start is end": ({"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 1}, None),
    "two ends in config.json": ({"eos_token_id": [1, 21]}, None),
    "bos instead of start": ({"bos_token_id": 9, "decoder_start_token_id": None}, None),
    "generation_config.json": (
        {"pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0},
        {"pad_token_id": 1, "eos_token_id": [2, 34], "decoder_start_token_id": 44},
    ),
}
layouts = pytest.mark.parametrize(("fields", "generation"), LAYOUTS.values(), ids=LAYOUTS.keys())


@pytest.fixture
def both(their_t5, theirs_on_disk):
    """Return transformers' model and the folder it is read from."""

    def both(fields: dict[str, Any], generation: dict[str, Any] | None) -> Any:
        import transformers

        torch.manual_seed(3)
        theirs = their_t5(**fields)
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.mul_(4)  # outputs vary, so that the ids matter
        folder = theirs_on_disk(theirs)
        if generation is not None:
            (folder / "generation_config.json").write_text(json.dumps(generation))
        theirs = transformers.T5ForConditionalGeneration.from_pretrained(folder).eval()
        return theirs, folder

    return both


def their_tokens(theirs: Any, **options: Any) -> list[list[int]]:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        rows = theirs.generate(
            input_ids=PROMPTS,
            attention_mask=torch.ones_like(PROMPTS),
            max_new_tokens=LENGTH,
            do_sample=False,
            **options,
        )
    return [cut(row[1:], theirs.generation_config.eos_token_id) for row in rows.tolist()]


def cut(row: Sequence[int], ends: int | list[int]) -> list[int]:
    return before_end(row, ends if isinstance(ends, list) else [ends])


@layouts
def test_outputs_are_those_of_transformers(both, fields, generation):
    theirs, folder = both(fields, generation)
    model, _ = load(folder, report=lambda line: None)
    ends = model.config.end_ids
    greedy = their_tokens(theirs)
    assert generate(model, PROMPTS, max_new_tokens=LENGTH).rows(ends) == greedy
    found = beam_search(model, PROMPTS, max_new_tokens=LENGTH, beams=Beams(width=3))
    best = [before_end(outputs[0].tokens, ends) for outputs in found]
    assert best == their_tokens(theirs, num_beams=3)
    with evaluation_mode(model, drop=False):
        slots = Slots(model, num_slots=2, max_source=8, max_target=LENGTH)
        for row, encoded in enumerate(slots.encode(PROMPTS.tolist())):
            slots.add(row, encoded, sampling=GREEDY, seed=0, limit=LENGTH)
        steps = [slots.step() for _ in range(LENGTH)]
    served = [[token for token in row if token is not None] for row in zip(*steps, strict=True)]
    assert [before_end(row, ends) for row in served] == greedy


@layouts
def test_losses_are_those_of_transformers(both, assert_close, fields, generation):
    if fields.get("decoder_start_token_id", 0) is None:
        pytest.skip("transformers has no loss without a start token")
    theirs, folder = both(fields, generation)
    model, _ = load(folder, report=lambda line: None)
    targets = torch.tensor([[5, 6, 44, 2], [31, 8, 4, 2]])
    batch = Batch(
        inputs_BS=PROMPTS,
        targets_BT=targets,
        input_segments_BS=None,
        target_segments_BT=None,
        source_B=torch.zeros(2, dtype=torch.int32),
    )
    with torch.no_grad():
        expected = theirs(input_ids=PROMPTS, labels=targets).loss
    assert_close(torch.tensor(held_out_loss(model, [batch], ["text"])["loss"]), expected, "loss")


@layouts
def test_a_saved_model_is_the_same_in_transformers(both, tmp_path, fields, generation):
    theirs, folder = both(fields, generation)
    model, _ = load(folder, report=lambda line: None)
    save(model, None, tmp_path / "again")
    again = type(theirs).from_pretrained(tmp_path / "again").eval()
    assert their_tokens(again) == their_tokens(theirs)
    if fields.get("decoder_start_token_id", 0) is not None:
        assert again.config.decoder_start_token_id == theirs.config.decoder_start_token_id
    assert load(tmp_path / "again")[0].config == model.config


def test_generation_config_is_kept_and_what_has_no_effect_is_named_once(both, tmp_path):
    settings = {"decoder_start_token_id": 0, "num_beams": 4, "max_length": 90, "top_k": 50}
    _, folder = both({}, {**settings, "suppress_tokens": [7], "forced_bos_token_id": 3})
    said: list[str] = []
    model, _ = load(folder, report=said.append)
    (line,) = said
    for name in ("num_beams=4", "max_length=90", "suppress_tokens=[7]", "forced_bos_token_id=3"):
        assert name in line
    assert "top_k" not in line
    assert "token_id=0" not in line
    save(model, None, tmp_path / "again")
    written = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    kept = {"suppress_tokens": [7], "forced_bos_token_id": 3, **settings}
    assert written == kept | {"eos_token_id": 1, "pad_token_id": 0}


def test_what_transformers_writes_by_itself_is_not_named(both):
    _, folder = both({}, None)
    assert unused_settings(json.loads((folder / "generation_config.json").read_text())) is None


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"eos_token_id": "x"}, "eos_token_id of generation_config.json is 'x'"),
        ({"decoder_start_token_id": 48}, "generation_start_id must be one of the 48"),
        ({"decoder_start_token_id": -1}, "an integer from 0 on"),
    ],
)
def test_ids_that_are_none_are_named(both, their_t5, theirs_on_disk, generation, message):
    folder = theirs_on_disk(their_t5())
    (folder / "generation_config.json").write_text(json.dumps(generation))
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_the_tokenizer_ends_texts_with_the_id_of_config_json(both):
    _, folder = both({"vocab_size": 400, "pad_token_id": 1, "eos_token_id": 2}, None)
    Tokenizer.bytes().save(folder)
    for tokenizer in (load(folder)[1], load_tokenizer(folder)):
        assert tokenizer is not None
        assert (tokenizer.pad_id, tokenizer.end_id, tokenizer.vocabulary_size) == (1, 2, 400)


@pytest.mark.parametrize("read", [load, load_tokenizer])
def test_a_tokenizer_larger_than_the_embedding_is_refused_before_anything_runs(both, read):
    _, folder = both({"vocab_size": 300}, None)
    Tokenizer.bytes().save(folder)
    with pytest.raises(DataError, match="ids up to 358, but the model's vocabulary ends at 299"):
        read(folder)
