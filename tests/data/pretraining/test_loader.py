import itertools
import json
import re
import threading

import pytest
import torch

from switchlm.data.config import DataConfig
from switchlm.data.pretraining.loader import open_data
from switchlm.errors import DataError

FIELDS = ("inputs_BS", "targets_BT", "input_segments_BS", "target_segments_BT", "source_B")


def assert_equal(left, right, rows=slice(None)):
    for name in FIELDS:
        whole, part = getattr(left, name), getattr(right, name)
        assert (whole is None) == (part is None), name
        if whole is not None:
            assert torch.equal(whole[rows], part), name


@pytest.fixture(params=["running", "packed", "mixed", "mixed and packed"])
def loader(request, open_corpus, corpus, tmp_path):
    """Loaders of each kind; the corpus is so small that a few steps cross epochs."""
    if request.param == "running":
        return open_corpus()
    if request.param == "packed":
        return open_corpus(input_length=64, pack=True)
    extra = tmp_path / "extra.jsonl"
    extra.write_text("".join(f'{{"text": "record {n} {"x y " * n}"}}\n' for n in range(30)))
    sources = (f"a={corpus}:0.7", f"b={extra}:0.3")
    if request.param == "mixed":
        return open_corpus(sources=sources)
    return open_corpus(sources=sources, input_length=64, target_length=96, pack=True)


def test_full_rows_of_running_text_need_no_segments(open_corpus):
    batch = open_corpus().batch(0)
    assert batch.inputs_BS.shape == (8, 32)
    assert batch.input_segments_BS is None
    assert batch.target_segments_BT is None
    assert batch.inputs_BS.dtype == batch.targets_BT.dtype == torch.int64
    assert batch.source_B.dtype == torch.int32
    assert (batch.inputs_BS[:, -1] == 1).all()
    assert (batch.targets_BT[:, -1] == 1).all()
    assert (batch.inputs_BS != 0).all()


def test_longer_targets_than_rows_of_running_text_need_change_nothing(open_corpus):
    assert_equal(open_corpus(target_length=24).batch(3), open_corpus().batch(3))


def test_packed_rows_are_as_long_as_the_longest_of_the_global_batch(open_corpus):
    loader = open_corpus(input_length=64, target_length=200, pack=True)
    for step in range(3):
        batch = loader.batch(step)
        assert (batch.targets_BT[batch.target_segments_BT == 0] == 0).all()
        for segments in (batch.input_segments_BS, batch.target_segments_BT):
            longest = int((segments != 0).sum(1).max())
            assert segments.shape[1] == -(-longest // 8) * 8
        lengths = {loader.share(rank, 8).batch(step).targets_BT.shape[1] for rank in range(8)}
        assert lengths == {batch.targets_BT.shape[1]}


def test_a_batch_is_a_function_of_seed_and_step(loader):
    late = loader.batch(900)
    for step in range(3):
        loader.batch(step)
    assert_equal(late, loader.batch(900))
    assert not torch.equal(late.inputs_BS, loader.batch(901).inputs_BS)


def test_any_number_of_workers_make_the_same_global_batch(loader):
    for step in (0, 1, 57):
        whole = loader.batch(step)
        for workers in (1, 2, 4, 8):
            share = 8 // workers
            for rank in range(workers):
                rows = slice(rank * share, (rank + 1) * share)
                assert_equal(whole, loader.share(rank, workers).batch(step), rows)


def test_workers_joining_and_leaving_in_mid_epoch_repeat_and_lose_nothing(open_corpus):
    loader = open_corpus(input_length=16)
    seen = []
    for step, workers in enumerate(itertools.chain([4] * 9, [2] * 9, [1] * 9, [4] * 9)):
        shares = [loader.share(rank, workers) for rank in range(workers)]
        seen += [share.sample_ids(step)[share.own_rows].tolist() for share in shares]
    assert sorted(itertools.chain(*seen)) == list(range(36 * 8))


@pytest.mark.parametrize("pack", [False, True])
def test_a_fresh_loader_resumes_exactly_across_an_epoch(open_corpus, corpus, tmp_path, pack):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(f'{{"text": "another text, number {n}"}}\n' for n in range(40)))
    settings = {"sources": (f"{corpus}:0.6", f"{other}:0.4"), "input_length": 64, "pack": pack}
    # An epoch of the larger source is about 15 steps.
    expected = dict(itertools.islice(open_corpus(seed=5, **settings).iterate(), 60))
    resumed = open_corpus(seed=5, **settings).iterate(start_step=10)
    for step, batch in itertools.islice(resumed, 50):
        assert_equal(expected[step], batch)
    resumed.close()
    other_seed = open_corpus(seed=6, **settings).batch(40)
    assert not torch.equal(other_seed.inputs_BS, expected[40].inputs_BS)


def test_iterate_prefetches_in_a_thread_and_stops_it(open_corpus):
    loader = open_corpus()
    batches = loader.iterate(prefetch=3)
    assert next(batches)[0] == 0
    assert any(thread.name.startswith("switchlm-loader") for thread in threading.enumerate())
    batches.close()
    assert not any(thread.name.startswith("switchlm-loader") for thread in threading.enumerate())


def test_what_goes_wrong_in_the_thread_reaches_the_caller(open_corpus, monkeypatch):
    def fail(sample_B, share):
        raise DataError(f"sample {sample_B[0]} cannot be read")

    loader = open_corpus()
    monkeypatch.setattr(loader, "make", fail)
    with pytest.raises(DataError, match="sample 24 cannot be read"):
        next(loader.iterate(3))


def test_rows_that_cannot_be_shared_out_are_refused(open_corpus):
    with pytest.raises(DataError, match="cannot be divided evenly over 3"):
        open_corpus().share(0, 3)


def test_held_out_text_is_never_trained_on(open_corpus):
    loader = open_corpus(input_length=64)

    def numbers(batches):
        lines = [
            line
            for batch in batches
            for inputs, targets in zip(batch.inputs_BS, batch.targets_BT, strict=True)
            for line in restore(loader.tokenizer, inputs.tolist(), targets.tolist()).split("\n")[1:]
        ]
        # Every document begins with its own number and a colon.
        return {line.split(":")[0] for line in lines if line.partition(":")[0].isdigit()}

    held_out = numbers(loader.held_out(6))
    trained = numbers(loader.batch(step) for step in range(40))
    assert held_out
    assert len(trained) > 40
    assert not held_out & trained


def restore(tokenizer, inputs, targets):
    spans, current = {}, []
    for token in targets[:-1]:
        if token in tokenizer.sentinel_ids:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    ids = [piece for token in inputs[:-1] for piece in spans.get(token, [token])]
    return "".join("\n" if number == 1 else tokenizer.decode([number]) for number in ids)


def test_held_out_batches_are_the_same_for_every_seed(open_corpus):
    for first, second in zip(
        open_corpus(seed=1).held_out(3), open_corpus(seed=2).held_out(3), strict=True
    ):
        assert_equal(first, second)


def test_held_out_batches_by_source(open_corpus, corpus, tmp_path):
    extra = tmp_path / "extra"
    extra.mkdir()
    for number in range(20):
        (extra / f"{number}.txt").write_text(f"zzz {number} " * 20)
    loader = open_corpus(sources=(str(corpus), f"z={extra}"))
    assert loader.sources == ("corpus", "z")
    for index, name in enumerate(loader.sources):
        (batch,) = loader.held_out(1, source=name)
        assert (batch.source_B == index).all()
    (only_z,) = loader.held_out(1, source="z")
    assert "zzz" in loader.tokenizer.decode(only_z.inputs_BS[0].tolist())
    with pytest.raises(DataError, match="no data source 'y'"):
        loader.held_out(1, source="y")


def test_a_source_of_less_than_two_rows_has_no_held_out_text(open_corpus, corpus, tmp_path):
    single = tmp_path / "single.jsonl"
    single.write_text(f'{{"text": "{"words and more " * 4}"}}\n')
    mixed = open_corpus(sources=(str(corpus), str(single)))
    assert (mixed.held_out(4)[0].source_B == 0).all()
    with pytest.raises(DataError, match="'single' has no held-out text"):
        mixed.held_out(1, source="single")
    message = "0, or the text does not fill two rows of 34 tokens, one to train on and one to hold"
    with pytest.raises(DataError, match=message):
        open_corpus(sources=(str(single),)).held_out(1)


def test_a_single_text_file_is_cut_so_that_some_is_held_out(open_corpus, tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"{number}: a line of a long book\n" for number in range(12_000)))
    assert len(open_corpus(sources=(str(path),)).held_out(2)) == 2


def test_an_example_is_shown_as_text(open_corpus):
    inputs, targets = open_corpus().example()
    assert "<extra_id_0>" in inputs
    assert targets.startswith("<extra_id_0>")


def test_settings_that_do_not_fit_are_refused(open_corpus, tmp_path):
    with pytest.raises(DataError, match="target_length 5 is too short: inputs of 32"):
        open_corpus(target_length=5)
    with pytest.raises(DataError, match="less than one row"):
        open_corpus(input_length=20_000, mean_span=100.0)
    with pytest.raises(DataError, match="no data sources"):
        open_corpus(sources=())


def test_progress_and_the_mixture_are_reported(open_corpus, corpus):
    lines = []
    open_corpus(sources=(f"a={corpus}:3", f"b={corpus}:1"), report=lines.append)
    for name, share in (("a", "75.0%"), ("b", "25.0%")):
        (line,) = (line for line in lines if line.startswith(f"{name} (60 files, 60 .txt): "))
        assert re.search(rf"held out \(\d+\.\d%\), {share} of the rows$", line)


def test_long_rows_have_as_many_spans_as_sentinels_and_this_is_said(open_corpus, tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(" ".join(f"word {number}" for number in range(4000)))
    lines = []
    loader = open_corpus(sources=(str(path),), input_length=2048, batch_size=1, report=lines.append)
    batch = loader.batch(0)
    sentinels = set(loader.tokenizer.sentinel_ids)
    assert batch.inputs_BS.shape == (1, 2048)
    assert sum(token in sentinels for token in batch.inputs_BS[0].tolist()) == 100
    assert any("tokens long on average, not 3 (data.mean_span)" in line for line in lines)
    lines.clear()
    open_corpus(sources=(str(path),), report=lines.append)
    assert not any("on average" in line for line in lines)


@pytest.mark.parametrize("share", [0.01, 0.5])
def test_a_short_text_is_split_by_position(open_corpus, tmp_path, share):
    path = tmp_path / "note.txt"
    path.write_text("".join(chr(97 + number % 26) for number in range(1500)))
    lines = []
    loader = open_corpus(
        sources=(str(path),), input_length=512, held_out_share=share, report=lines.append
    )
    (line,) = (line for line in lines if line.startswith("note (note.txt): "))
    assert ("751 tokens to train on, 750" in line) == (share == 0.5)
    assert loader.held_out(1)[0].inputs_BS.shape == (8, 512)
    assert any("a row of 568 tokens is the least" in line for line in lines) == (share == 0.01)


def test_a_few_large_files_keep_the_wanted_share(open_corpus, tmp_path):
    folder = tmp_path / "wiki"
    folder.mkdir()
    for name, size in (("train.txt", 60_000), ("valid.txt", 20_000), ("README.md", 100)):
        (folder / name).write_text("".join(f"Sentence {n} of it.\n" for n in range(size // 20)))
    lines = []
    open_corpus(sources=(str(folder),), held_out_share=0.02, report=lines.append)
    (line,) = (line for line in lines if line.startswith("wiki (3 files, 2 .txt, 1 .md): "))
    share = float(re.search(r"held out \(([\d.]+)%\)", line)[1])
    assert 1 <= share <= 4
    assert not any(line.startswith("Warning") for line in lines)


def test_a_unigram_tokenizer_is_trained_once(open_corpus):
    lines = []
    first = open_corpus(tokenizer="unigram", vocabulary_size=768, report=lines.append)
    second = open_corpus(tokenizer="unigram", vocabulary_size=768, report=lines.append)
    assert sum("Training a tokenizer" in line for line in lines) == 1
    assert first.tokenizer.fingerprint() == second.tokenizer.fingerprint()
    assert_equal(first.batch(3), second.batch(3))


def test_a_saved_tokenizer_can_be_named_or_given(open_corpus, corpus, tmp_path):
    trained = open_corpus(tokenizer="unigram", vocabulary_size=768)
    trained.tokenizer.save(tmp_path / "saved")
    named = open_corpus(tokenizer=str(tmp_path / "saved"))
    assert_equal(trained.batch(0), named.batch(0))
    config = DataConfig(sources=(str(corpus),), input_length=32, batch_size=8, held_out_share=0.1)
    given = open_data(config, seed=0, cache_dir=tmp_path / "cache", tokenizer=trained.tokenizer)
    assert_equal(trained.batch(0), given.batch(0))


@pytest.fixture
def translations(tmp_path):
    """One file a language, 40 parallel documents; a word of document 7 says `7` in each."""
    folder = tmp_path / "translations"
    folder.mkdir()
    for language, repeats in (("xx", 30), ("yy", 3)):
        records = [
            {"document": f"d{number}", "text": f"{language}{number} " * repeats}
            for number in range(40)
        ]
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{language}.jsonl").write_text(text)
    return folder


def test_the_same_documents_are_held_out_in_all_languages(translations, open_corpus):
    loader = open_corpus(
        sources=(f"each:{translations}",), group_column="document", held_out_share=0.1
    )
    assert loader.sources == ("xx", "yy")
    seen = {"train": set(), "held out": set()}
    for kind, batches in (
        ("train", [loader.batch(step) for step in range(60)]),
        ("held out", loader.held_out(20)),
    ):
        for batch in batches:
            for row in batch.inputs_BS:
                text = loader.tokenizer.decode(row.tolist())
                seen[kind] |= set(re.findall(r"(?<= )(?:xx|yy)(\d+)(?= )", text))
    assert seen["held out"]
    assert not seen["held out"] & seen["train"]


def test_many_sources_are_reported_in_one_line(translations, open_corpus):
    record = json.dumps({"text": "a text of some length, " * 9})
    for number in range(20):
        (translations / f"n{number}.jsonl").write_text(f"{record}\n" * 3)
    said = []
    open_corpus(sources=(f"each:{translations}",), report=said.append)
    lines = [line for line in said if "to train on" in line]
    assert len(lines) == 1
    assert lines[0].startswith("22 sources: ")
    assert "(xx) each of the rows" in lines[0]


@pytest.mark.parametrize("tokenizer", ["bytes", "unigram"])
def test_a_language_without_text_is_refused_by_name(translations, open_corpus, tokenizer):
    (translations / "zz.jsonl").write_text('{"document": "d0", "text": "  "}\n')
    with pytest.raises(DataError, match=r"source 'zz' has no text in .*skipped: 1 empty.*Add text"):
        open_corpus(
            sources=(f"each:{translations}",), tokenizer=tokenizer, vocabulary_size=512,
            mixing="temperature",
        )  # fmt: skip
