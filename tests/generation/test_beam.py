import itertools
import warnings

import pytest
import torch
import transformers

from switchlm.errors import CheckpointError, ConfigError, DataError
from switchlm.generation import beam
from switchlm.generation.beam import Beams, beam_search
from switchlm.generation.decode import generate, pad_prompts
from switchlm.huggingface import load
from switchlm.model.transformer import shift_right

MODELS = {
    "T5 v1.0": (
        "T5ForConditionalGeneration",
        {"num_experts": 0, "tied_head": True, "scale": 8.0},
        {},
    ),
    "T5 v1.1": (
        "T5ForConditionalGeneration",
        {"num_experts": 0, "gated": True, "activation": "gelu"},
        {},
    ),
    "Switch": (
        "SwitchTransformersForConditionalGeneration",
        {},
        {"mode": "hf", "expert_capacity": 64},
    ),
}


def ending_often(model, by=5.0):
    """Make the end token as likely as others, so that outputs end at all lengths."""
    original = model.decode

    def decode(token_B1, encoded_BSD, **options):
        output = original(token_B1, encoded_BSD, **options)
        output.logits_BTV[..., 1] += by
        return output

    model.decode = decode
    return model


class EndingOften(transformers.LogitsProcessor):
    """The same of log probabilities: what is added to a logit is added before the softmax."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, 1] += 5.0
        return scores.log_softmax(-1)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A model here and in transformers."""
    made = {}

    def pair(name, build):
        if name not in made:
            kind, changes, router = MODELS[name]
            model = build(seed=4, router=router, **changes)
            folder = tmp_path_factory.mktemp("twins") / "model"
            load.save(model, None, folder)
            made[name] = model, getattr(transformers, kind).from_pretrained(folder).eval()
        return made[name]

    return pair


@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, -1.5, 2.5])
@pytest.mark.parametrize("width", [2, 5])
@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_transformers(
    build, prompts, pairs, name, width, length_penalty, early_stopping
):
    model, theirs = pairs(name, build)
    inputs_BS, segments_BS = pad_prompts(prompts, 0)
    beams = Beams(width=width, length_penalty=length_penalty, early_stopping=early_stopping)
    try:
        found = beam_search(
            ending_often(model), inputs_BS, segments_BS, max_new_tokens=10, beams=beams
        )
    finally:
        del model.decode
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        expected = theirs.generate(
            input_ids=inputs_BS,
            attention_mask=(segments_BS != 0).long(),
            max_new_tokens=10,
            do_sample=False,
            num_beams=width,
            num_return_sequences=width,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            logits_processor=[EndingOften()],
            output_scores=True,
            return_dict_in_generate=True,
        )
    ours = [output for outputs in found for output in outputs]
    # After the end token transformers repeats it, where padding has the id 0.
    rows = expected.sequences[:, 1:].tolist()
    cut = [row[: row.index(1) + 1] if 1 in row else row for row in rows]
    assert [output.tokens for output in ours] == cut
    scores = torch.tensor([output.score for output in ours])
    torch.testing.assert_close(scores, expected.sequences_scores, rtol=1e-4, atol=1e-4)
    assert len({tuple(output.tokens) for output in ours}) > len(ours) // 2
    assert any(output.finished for output in ours), "a test in which nothing ends is none"


def test_a_wide_search_finds_the_most_probable_outputs(build):
    """Compare with all outputs of two tokens."""
    model = build(vocabulary_size=16)
    inputs_BS = torch.tensor([[3, 5, 7]])
    beams = Beams(width=8, length_penalty=0.0)
    found = beam_search(model, inputs_BS, max_new_tokens=2, beams=beams)[0]
    every = [[1], *map(list, itertools.product([0, *range(2, 16)], range(16)))]
    scores = []
    with torch.no_grad():
        for tokens in every:
            shifted = shift_right(torch.tensor([tokens]), None, 0)
            log_TV = model(inputs_BS, shifted).logits_BTV[0].log_softmax(-1)
            scores.append(sum(float(log_TV[place, token]) for place, token in enumerate(tokens)))
    best = max(scores)
    assert found[0].tokens == every[scores.index(best)]
    assert found[0].score == pytest.approx(best, abs=1e-4)


def test_one_beam_is_greedy(build, prompts):
    model = build()
    inputs_BS, segments_BS = pad_prompts(prompts, 0)
    greedy = generate(model, inputs_BS, segments_BS, max_new_tokens=9).rows([1])
    found = beam_search(model, inputs_BS, segments_BS, max_new_tokens=9, beams=Beams(width=1))
    assert [[token for token in outputs[0].tokens if token != 1] for outputs in found] == greedy


def test_a_prompt_alone_in_a_batch_and_padded_has_the_same_output(build, prompts):
    model = ending_often(build(router={"mode": "hf", "expert_capacity": 2}))
    inputs_BS, segments_BS = pad_prompts(prompts, 0)
    limits = [8, 3, 8, 5]
    together = beam_search(
        model, inputs_BS, segments_BS, max_new_tokens=limits, beams=Beams(width=3)
    )
    for prompt, limit, outputs in zip(prompts, limits, together, strict=True):
        alone = beam_search(
            model, torch.tensor([prompt]), max_new_tokens=limit, beams=Beams(width=3)
        )[0]
        assert [output.tokens for output in alone] == [output.tokens for output in outputs]
        assert [output.finished for output in alone] == [output.finished for output in outputs]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "at least 1 beam"),
        ({"length_penalty": float("nan")}, "length penalty"),
        ({"width": 193}, "193 beams are too many"),
    ],
)
def test_bad_options_are_refused(build, options, message):
    with pytest.raises(ConfigError, match=message):
        beam_search(build(), torch.tensor([[3]]), max_new_tokens=2, beams=Beams(**options))


def test_bad_prompts_and_models_are_refused(build):
    model = build()
    with pytest.raises(DataError, match="prompt is empty"):
        beam_search(model, *pad_prompts([[3], []], 0), max_new_tokens=2, beams=Beams())
    with pytest.raises(ConfigError, match="At least 1 new token"):
        beam_search(model, torch.tensor([[3]]), max_new_tokens=0, beams=Beams())
    model.head.weight.data[7] = float("nan")
    with pytest.raises(CheckpointError, match="not finite"):
        beam_search(model, torch.tensor([[3]]), max_new_tokens=2, beams=Beams())


def test_an_overflow_is_an_error_at_every_step(build, overflowing):
    model = overflowing(build(), row=0, step=3)
    with pytest.raises(CheckpointError, match="--dtype bfloat16"):
        beam_search(model, torch.tensor([[3]]), max_new_tokens=6, beams=Beams(width=2))


def test_more_beams_than_fit_are_refused(build, monkeypatch):
    monkeypatch.setattr(beam, "available_bytes", lambda: 1000)
    with pytest.raises(ConfigError, match=r"8 beams of 1 prompts need .* Take fewer"):
        beam_search(build(), torch.tensor([[5, 6]]), max_new_tokens=2, beams=Beams(width=8))
