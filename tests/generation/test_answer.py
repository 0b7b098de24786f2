import pytest
import torch

from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import ConfigError, DataError
from switchlm.generation.answer import (
    answer,
    answer_all,
    best_answers,
    count_blanks,
    put_into_blanks,
    read_spans,
    stream,
)
from switchlm.generation.beam import Beams
from switchlm.generation.sampling import GREEDY, Sampling

TOKENIZER = Tokenizer.bytes()
TEXT = "def <extra_id_0>(self)"


def drain(pieces):
    found = []
    while True:
        try:
            found.append(next(pieces))
        except StopIteration as end:
            return found, end.value


def test_pieces_joined_are_the_answer_and_have_complete_characters(build, generating):
    text = "<extra_id_0>größe<extra_id_1>€!"
    found, said = drain(stream(generating(build(), text), TOKENIZER, "x", max_new_tokens=50))
    assert found == ["<extra_id_0>", "g", "r", "ö", "ß", "e", "<extra_id_1>", "€", "!"]
    assert said.output == text
    assert said.spans == {0: "größe", 1: "€!"}
    assert said.finished


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.5)])
def test_streamed_output_is_the_same(build, sampling):
    model = build()
    options = {"max_new_tokens": 40, "sampling": sampling, "seed": 3}
    whole = answer(model, TOKENIZER, TEXT, **options)
    found, said = drain(stream(model, TOKENIZER, TEXT, **options))
    assert said == whole
    assert "".join(found) == whole.output
    stop = whole.output[3:6]
    expected = whole.output[: whole.output.index(stop)]
    found, said = drain(stream(model, TOKENIZER, TEXT, stops=[stop], **options))
    assert "".join(found) == said.output == expected
    assert said.finished


def test_a_stop_string_ends_generation_and_is_not_part_of_the_output(build, generating):
    model = generating(build(), "<extra_id_0>one two<extra_id_1>three")
    calls, decode = [], model.decode
    model.decode = lambda *inputs, **options: calls.append(1) or decode(*inputs, **options)
    said = answer(model, TOKENIZER, "x", max_new_tokens=50, stops=["zzz", " tw", "three"])
    assert said.output == "<extra_id_0>one"
    assert said.spans == {0: "one"}
    assert said.finished
    assert len(calls) == 7


@pytest.mark.parametrize(
    ("length", "spans"),
    [
        (None, {0: "ab", 1: "c"}),
        (99, {0: "ab", 1: "c"}),
        (14, {0: "a"}),
        (20, {0: "ab"}),
        (27, {0: "ab", 1: ""}),
        (5, {}),
    ],
)
def test_spans_end_at_the_stop_string(length, spans):
    output = TOKENIZER.encode("x<extra_id_0>ab<extra_id_1>c<extra_id_0>d")
    assert read_spans(output, TOKENIZER, length) == spans


def test_errors(build):
    model = build()
    with pytest.raises(DataError, match="text is empty"):
        answer(model, TOKENIZER, "", max_new_tokens=1)
    with pytest.raises(ConfigError, match="stop string is empty"):
        answer(model, TOKENIZER, "a", max_new_tokens=1, stops=[""])


def test_gradients_are_enabled_while_a_stream_is_paused(build):
    model = build().train()
    pieces = stream(model, TOKENIZER, "a", max_new_tokens=30)
    next(pieces)
    pieces.close()
    assert model.training
    assert torch.is_grad_enabled()


TEXTS = ["def <extra_id_0>(self)", "x", "größe <extra_id_0>", "a <extra_id_0> " * 5, "x", "return"]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, top_p=0.9)])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 10])
def test_many_texts_have_the_same_answers_as_each_alone(build, batch_size, sampling):
    model = build(router={"mode": "hf", "expert_capacity": 1})
    limits = [9, 30, 12, 20, 30, 1]
    options = {"sampling": sampling, "seed": 5, "stops": ["e", "7"]}
    found = dict(
        answer_all(model, TOKENIZER, TEXTS, max_new_tokens=limits, batch_size=batch_size, **options)
    )
    alone = [
        answer(model, TOKENIZER, text, max_new_tokens=limit, **{**options, "seed": 5 + place})
        for place, (text, limit) in enumerate(zip(TEXTS, limits, strict=True))
    ]
    assert [found[place] for place in range(len(TEXTS))] == alone
    assert len({said.output for said in alone}) > 3, "a test on dull outputs is none"


def test_samples_of_equal_texts_differ_and_a_seed_repeats_them(build):
    model = build(scale=1.0)
    options = {"max_new_tokens": 12, "sampling": Sampling(temperature=1.0), "batch_size": 3}

    def outputs(**seed):
        found = dict(answer_all(model, TOKENIZER, [TEXT] * 4, **options, **seed))
        return [found[place].output for place in range(4)]

    assert len({*outputs(), *outputs()}) == 8
    assert outputs(seed=7) == outputs(seed=7)
    assert len(set(outputs(seed=7))) == 4
    assert outputs(seed=8)[:3] == outputs(seed=7)[1:]


def test_texts_of_a_batch_are_of_similar_length(build):
    model, shapes = build(), []
    original = model.decode

    def decode(*inputs, **options):
        shapes.append(tuple(options["input_segments_BS"].shape))
        return original(*inputs, **options)

    model.decode = decode
    list(
        answer_all(model, TOKENIZER, ["a", "b" * 9, "cc", "d" * 8], max_new_tokens=1, batch_size=2)
    )
    assert shapes == [(2, 10), (2, 3)]


def test_beam_search_of_many_texts_equals_that_of_each_alone(build):
    model = build()
    limits = [9, 12, 12, 6, 12, 1]
    options = {"beams": Beams(width=3), "stops": ["e", "7"]}
    found = dict(
        best_answers(model, TOKENIZER, TEXTS, max_new_tokens=limits, batch_size=4, **options)
    )
    for place, (text, limit) in enumerate(zip(TEXTS, limits, strict=True)):
        alone = best_answers(
            model, TOKENIZER, [text], max_new_tokens=limit, batch_size=1, **options
        )
        [(_, expected)] = alone
        assert [each.output for each in found[place]] == [each.output for each in expected]
        assert [each.score for each in expected] == sorted(
            (each.score for each in expected), reverse=True
        )
        assert not any("e" in each.output.replace("extra", "") for each in expected)


def test_the_error_of_an_empty_text_has_its_number(build):
    with pytest.raises(DataError, match="Text 2 is empty"):
        list(answer_all(build(), TOKENIZER, ["a", ""], max_new_tokens=1, batch_size=2))


def test_an_empty_stop_string_is_an_error(build):
    options = {"max_new_tokens": 1, "batch_size": 2, "beams": Beams(), "stops": [""]}
    with pytest.raises(ConfigError, match="stop string is empty"):
        list(best_answers(build(), TOKENIZER, ["a"], **options))


def test_every_end_token_of_the_model_ends_an_output_and_is_not_part_of_it(build, generating):
    ends = TOKENIZER.encode("!?")
    for text in ("one!", "one?"):
        model = generating(build(generation_end_ids=(*ends, 1)), text)
        said = answer(model, TOKENIZER, "x", max_new_tokens=50)
        assert (said.output, said.finished) == ("one", True)


def test_a_blank_of_thousands_of_digits_is_text():
    """`int` refuses so many, with an error of its own."""
    with pytest.raises(DataError, match="no blank"):
        count_blanks(f"<extra_id_{'9' * 5000}>", TOKENIZER)
    other_digit = "<extra_id_\u0661>"
    assert put_into_blanks(f"<extra_id_0> {other_digit}", {0: "a", 1: "b"}) == f"a {other_digit}"
