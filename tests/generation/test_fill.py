import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import DataError
from switchlm.generation.answer import answer, count_blanks, fill, put_into_blanks, read_spans

TOKENIZER = Tokenizer.bytes()
S = TOKENIZER.sentinel_ids


def encoded(text):
    return TOKENIZER.encode(text)


def test_spans_are_the_text_after_sentinels():
    output = encoded("<extra_id_0>size<extra_id_1>self._size<extra_id_2>")
    assert read_spans(output, TOKENIZER) == {0: "size", 1: "self._size", 2: ""}


def test_text_before_the_first_sentinel_is_ignored():
    assert read_spans(encoded("oops<extra_id_3>x"), TOKENIZER) == {3: "x"}
    assert read_spans(encoded("oops"), TOKENIZER) == {}


def test_the_first_span_of_a_blank_is_used():
    output = encoded("<extra_id_0>a<extra_id_1>b<extra_id_0>c")
    assert read_spans(output, TOKENIZER) == {0: "a", 1: "b"}


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="<"), min_size=1)))
def test_filling_undoes_the_masking(pieces):
    text = "".join(
        f"<extra_id_{place // 2}>" if place % 2 else piece for place, piece in enumerate(pieces)
    )
    output = "".join(
        f"<extra_id_{place // 2}>{piece}" for place, piece in enumerate(pieces) if place % 2
    )
    spans = read_spans(encoded(output), TOKENIZER)
    assert put_into_blanks(text, spans) == "".join(pieces)


def test_a_blank_without_a_span_stays():
    filled = put_into_blanks("a <extra_id_0> b <extra_id_1>", {1: "<extra_id_0>"})
    assert filled == "a <extra_id_0> b <extra_id_0>"


@pytest.mark.parametrize(
    ("text", "message"),
    [("nothing to do", "no blank"), ("<extra_id_100>", "has only <extra_id_0> to <extra_id_99>")],
)
def test_texts_that_cannot_be_filled_are_errors(text, message):
    with pytest.raises(DataError, match=message):
        count_blanks(text, TOKENIZER)


def test_fill_inserts_the_model_s_spans_into_the_text(build, generating):
    model = generating(build(), "<extra_id_0>größe<extra_id_1>1")
    text = "def <extra_id_0>(self): return <extra_id_1>  # <extra_id_0>"
    assert fill(model, TOKENIZER, text) == "def größe(self): return 1  # größe"


def test_the_limit_depends_on_the_number_of_blanks(build, generating):
    model = generating(build(), "x" * 200)
    fill(model, TOKENIZER, "<extra_id_0> <extra_id_1> <extra_id_0>")
    rest = answer(model, TOKENIZER, "text", max_new_tokens=200)
    assert rest.output == "x" * (200 - 64)
    assert rest.finished


def test_an_output_at_the_limit_is_not_finished(build, generating):
    said = answer(generating(build(), "x" * 9), TOKENIZER, "text", max_new_tokens=3)
    assert said.output == "xxx"
    assert not said.finished


def test_the_prompt_ends_with_the_end_token(build):
    model, seen = build(), []
    original = model.encode

    def encode(inputs_BS, segments_BS=None):
        seen.append(inputs_BS.tolist())
        return original(inputs_BS, segments_BS)

    model.encode = encode
    answer(model, TOKENIZER, "a<extra_id_0>", max_new_tokens=1)
    assert seen == [[[3 + ord("a"), S[0], 1]]]


def test_an_empty_text_is_refused(build):
    with pytest.raises(DataError, match="text is empty"):
        answer(build(), TOKENIZER, "", max_new_tokens=1)


def test_a_tokenizer_of_another_vocabulary_is_refused(build):
    model = build(vocabulary_size=300)
    with pytest.raises(DataError, match="vocabulary"):
        answer(model, TOKENIZER, "<extra_id_0>", max_new_tokens=1)
