import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from switchlm.data.text.tokenizer import Tokenizer, Vocabulary
from switchlm.errors import DataError

TEXTS = st.text(st.characters(codec="utf-8"), max_size=60)
SPECIALS = st.sampled_from(["</s>", "<pad>", "<unk>", "<extra_id_0>", "<extra_id_99>", "<extra_"])
BYTES = Tokenizer.bytes()


def t5_like():
    """A tokenizer file as T5's: no special knowledge of this package in it."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [(piece, -float(rank)) for rank, piece in enumerate("▁abcdefgh", start=1)]
    backend = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=2))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.add_special_tokens(["<pad>", "</s>", "<unk>"])
    backend.add_special_tokens([f"<extra_id_{number}>" for number in reversed(range(100))])
    return backend


def test_bytes_are_three_special_tokens_then_bytes_then_sentinels_counted_down():
    assert (BYTES.pad_id, BYTES.end_id) == (0, 1)
    assert BYTES.encode("a\n") == [3 + ord("a"), 3 + ord("\n")]
    assert BYTES.sentinel_ids == tuple(range(358, 258, -1))
    assert BYTES.vocabulary_size == 384


@given(st.lists(TEXTS | SPECIALS, max_size=6).map("".join))
def test_the_fast_encoding_of_bytes_is_that_of_the_saved_file(text):
    fast = BYTES.encode(text)
    assert fast == BYTES.backend.encode(text, add_special_tokens=False).ids


@given(TEXTS)
def test_bytes_are_lossless(text):
    assert BYTES.decode(BYTES.encode_plain([text])[0]) == text


def test_sentinels_in_a_text_are_encoded_and_decoded():
    ids = BYTES.encode("Thank <extra_id_0> me <extra_id_1>")
    assert ids.count(358) == ids.count(357) == 1
    assert BYTES.decode([0, *ids, 1]) == "Thank <extra_id_0> me <extra_id_1>"
    assert BYTES.without_special().decode(ids) == "Thank  me "


def test_threads_that_read_a_corpus_do_not_change_what_others_encode():
    tokenizer = Tokenizer(t5_like())
    text = "abc</s>h <extra_id_0>" * 50
    plain, understood = tokenizer.encode_plain([text])[0].tolist(), tokenizer.encode(text)
    assert plain != understood

    def check(turn):
        if turn % 2:
            return tokenizer.encode(text) == understood
        return tokenizer.encode_plain([text])[0].tolist() == plain

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(check, range(400)))


def test_a_corpus_keeps_the_ids_of_tokens_that_were_added():
    backend = t5_like()
    backend.add_tokens(["<tab>", "abc"])
    tokenizer = Tokenizer(backend)
    ids = tokenizer.encode_plain(["abcd<tab>h"])[0].tolist()
    assert ids == tokenizer.encode("abcd<tab>h")
    assert {backend.token_to_id("abc"), backend.token_to_id("<tab>")} <= set(ids)


@pytest.mark.parametrize("make", [Tokenizer.bytes, lambda: Tokenizer(t5_like())])
def test_a_corpus_never_yields_special_tokens(make):
    tokenizer = make()
    ids = tokenizer.encode_plain(["a</s>b<extra_id_0><pad>"])[0]
    special = {tokenizer.pad_id, tokenizer.end_id, *tokenizer.sentinel_ids}
    assert not special & set(ids.tolist())


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(DataError, match="surrogate"):
        BYTES.encode("a\ud800")


def test_saving_and_loading_gives_the_same_tokenizer(tmp_path):
    BYTES.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        again = Tokenizer.load(path)
        assert again.fingerprint() == BYTES.fingerprint()
        assert again.encode("grüße <extra_id_7>") == BYTES.encode("grüße <extra_id_7>")


def test_transformers_loads_what_is_saved(tmp_path):
    from transformers import AutoTokenizer

    BYTES.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "def f():\n    return 'ü' # <extra_id_3>\t\n"
    assert theirs(text).input_ids == [*BYTES.encode(text), BYTES.end_id]
    assert theirs.decode(BYTES.encode(text)) == text
    assert (theirs.pad_token_id, theirs.eos_token_id) == (0, 1)
    assert len(theirs) == 359
    assert set(BYTES.sentinel_ids) <= set(theirs.all_special_ids)


def test_a_t5_tokenizer_keeps_its_sentinels(tmp_path):
    t5_like().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.backend.to_str() == t5_like().to_str()
    assert (tokenizer.pad_id, tokenizer.end_id) == (0, 1)
    assert tokenizer.sentinel_ids == tuple(range(111, 11, -1))
    assert tokenizer.vocabulary_size == 128


def test_what_another_tokenizer_lacks_is_added(tmp_path):
    plain = tokenizers.Tokenizer(models.WordLevel({"hello": 0, "you": 1}, unk_token="you"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.add_special_tokens(["<|endoftext|>"])
    plain.enable_padding(length=20)
    plain.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.end_id == 2
    assert tokenizer.pad_id == 3
    assert tokenizer.sentinel_ids == tuple(range(103, 3, -1))
    assert tokenizer.encode("hello") == [0]
    tokenizer.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").fingerprint() == tokenizer.fingerprint()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"model": null}', '{"version": "9", "model": {"type": "BPE"}}']
)
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(DataError, match="tokenizer file"):
        Tokenizer.load(tmp_path)


def test_a_missing_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match="no tokenizer at"):
        Tokenizer.load(tmp_path)


def test_bytes_that_are_not_text_are_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8"):
        Tokenizer.load(tmp_path)


def test_an_absurd_token_id_is_refused():
    damaged = json.loads(BYTES.to_json())
    damaged["model"]["vocab"]["a"] = 4_000_000_000
    with pytest.raises(DataError, match="token id 4000000000"):
        Tokenizer.from_json(json.dumps(damaged))


@given(st.data())
def test_damaged_files_raise_nothing_but_data_errors(data):
    raw = bytearray(Tokenizer(t5_like()).to_json().encode())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place : place + data.draw(st.integers(0, 12))] = data.draw(st.binary(max_size=4))
    try:
        tokenizer = Tokenizer.from_json(raw.decode("utf-8", errors="replace"))
    except DataError:
        return
    assert max(tokenizer.sentinel_ids) < tokenizer.vocabulary_size


def test_the_ids_of_a_model_count_and_added_sentinels_fit_its_vocabulary():
    text = BYTES.to_json().replace("<pad>", "<zero>").replace("</s>", "<one>")
    own = Tokenizer.from_json(text, Vocabulary(size=359, pad_id=1, end_id=2))
    assert (own.pad_id, own.end_id, own.vocabulary_size) == (1, 2, 359)
    assert own.backend.token_to_id("</s>") is None  # nothing was added
    assert own.fingerprint() != Tokenizer.from_json(text).fingerprint()
    plain = tokenizers.Tokenizer(models.WordLevel({"hello": 0, "you": 1}, unk_token="you"))
    crowded = Tokenizer(plain, vocabulary=Vocabulary(size=5, pad_id=0, end_id=1))
    assert crowded.sentinel_ids == (4, 3, 2)


def test_tokens_beyond_the_vocabulary_of_the_model_are_refused():
    with pytest.raises(DataError, match="ids up to 358, but the model's vocabulary ends at 299"):
        Tokenizer.from_json(BYTES.to_json(), Vocabulary(size=300, pad_id=0, end_id=1))
