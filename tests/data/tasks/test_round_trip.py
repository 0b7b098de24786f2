import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from switchlm.data.tasks.loader import encode_texts
from switchlm.data.tasks.round_trip import comparable, describe_losses
from switchlm.data.text.tokenizer import Tokenizer

BYTES = Tokenizer.bytes()


@pytest.fixture(scope="module")
def words():
    """A tokenizer as T5's: of small letters, without braces and line ends."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [(piece, -1.0) for piece in "▁abcdefghijklmnopqrstuvwxyz"]
    backend = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=2))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<pad>", "</s>", "<unk>", "<sep>"])
    return Tokenizer(backend)


def described(tokenizer, inputs, targets, length=50):
    ids = [encode_texts(texts, tokenizer, length)[0] for texts in (inputs, targets)]
    return describe_losses("mine", targets, *ids, tokenizer, length)


def test_targets_that_do_not_come_back_are_counted_with_an_example(words):
    line = described(words, ["abc", "ab"], ["fine", "{a}", "two\nlines"])
    assert line == (
        "mine: 2 of 3 targets cannot be written by the tokenizer and are learned as what comes "
        "back, such as '{a}' as '<unk>a<unk>'; 9.09% of the target tokens are unknown to its "
        "vocabulary."
    )
    ids = np.concatenate(encode_texts(["fine", "{a}", "two\nlines"], words, 50)[0])
    unknown = (ids == words.unknown_id).mean()
    assert f"{unknown:.2%}" == "9.09%"


def test_unknown_characters_of_inputs_are_counted(words):
    assert described(words, ["{"], ["fine"]) == (
        "mine: 33.33% of the input tokens are unknown to its vocabulary."
    )


def test_nothing_is_said_where_everything_is_written(words):
    assert described(words, ["abc"], ["one <sep> two", "a<sep>b <extra_id_0> c"]) is None
    assert described(BYTES, ["{"], ["{a: 1}\n  größe  <extra_id_0> x"]) is None
    assert described(BYTES, ["x"], ["too long for the row"], length=5) is None


def test_the_end_token_within_a_target_is_counted(words):
    assert "1 targets hold the end token" in described(words, ["a"], ["a </s> b", "c"])


def test_white_space_around_added_tokens_does_not_count(words):
    same = {comparable(text, words) for text in ("a<sep>b", "a <sep> b", " a\n<sep>  b ")}
    assert same == {"a <sep> b"}
    assert comparable("a  b", words) == "a  b"
