import pytest

from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import ConfigError, DataError
from switchlm.generation.answer import answer
from switchlm.generation.batch import answer_all, best_answers
from switchlm.generation.beam import Beams
from switchlm.generation.sampling import GREEDY, Sampling

TOKENIZER = Tokenizer.bytes()
TEXTS = ["def <extra_id_0>(self)", "x", "größe <extra_id_0>", "a <extra_id_0> " * 5, "x", "return"]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, top_p=0.9)])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 10])
def test_many_texts_get_what_each_gets_alone(build, batch_size, sampling):
    model = build(router={"mode": "hf", "expert_capacity": 1})
    limits = [9, 30, 12, 20, 30, 1]
    options = {"sampling": sampling, "seed": 5, "stops": ["e", "7"]}
    found = dict(
        answer_all(model, TOKENIZER, TEXTS, max_new_tokens=limits, batch_size=batch_size, **options)
    )
    alone = [
        answer(model, TOKENIZER, text, max_new_tokens=limit, **options)
        for text, limit in zip(TEXTS, limits, strict=True)
    ]
    assert [found[place] for place in range(len(TEXTS))] == alone
    assert len({said.output for said in alone}) > 3, "a test on dull outputs is none"


def test_texts_of_a_batch_are_of_similar_length(build):
    model, shapes = build(), []
    original = model.encode

    def encode(inputs_BS, segments_BS=None):
        shapes.append(tuple(inputs_BS.shape))
        return original(inputs_BS, segments_BS)

    model.encode = encode
    list(
        answer_all(model, TOKENIZER, ["a", "b" * 9, "cc", "d" * 8], max_new_tokens=1, batch_size=2)
    )
    assert shapes == [(2, 10), (2, 3)]


def test_beams_find_for_many_texts_what_they_find_for_each_alone(build):
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


def test_an_empty_text_is_told_by_its_number(build):
    with pytest.raises(DataError, match="Text 2 is empty"):
        list(answer_all(build(), TOKENIZER, ["a", ""], max_new_tokens=1, batch_size=2))


def test_an_empty_stop_string_is_told(build):
    options = {"max_new_tokens": 1, "batch_size": 2, "beams": Beams(), "stops": [""]}
    with pytest.raises(ConfigError, match="stop string is empty"):
        list(best_answers(build(), TOKENIZER, ["a"], **options))
