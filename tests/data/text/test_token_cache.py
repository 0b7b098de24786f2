import json
import multiprocessing
import os
import signal
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from switchlm.data.config import Columns
from switchlm.data.text import readers, sources, token_cache
from switchlm.data.text.readers import Document
from switchlm.data.text.sources import parse
from switchlm.data.text.token_cache import open_cache
from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import DataError

TOKENIZER = Tokenizer.bytes()


def build(source, folder, tokenizer=TOKENIZER, report=lambda line: None, **settings):
    settings = {"columns": Columns(), "max_documents": None} | settings
    return open_cache(parse(str(source)), tokenizer, Path(folder), report=report, **settings)


def finished(folder):
    return sorted(path.name for path in Path(folder).iterdir() if path.is_dir())


def test_the_cache_holds_every_document_and_its_end(corpus, tmp_path):
    made = build(corpus, tmp_path / "cache")
    texts = [path.read_text(encoding="utf-8") for path in sorted(corpus.iterdir())]
    assert made.tokens.dtype == np.uint16
    assert len(made.hashes_D) == len(texts)
    for number, text in enumerate(texts):
        tokens = made.tokens[made.offsets[number] : made.offsets[number + 1]].tolist()
        assert tokens == [*TOKENIZER.encode(text), TOKENIZER.end_id]
    assert made.lengths_D.tolist() == [len(text.encode()) for text in texts]


def test_it_is_built_once_and_again_when_anything_changes(corpus, tmp_path):
    lines = []
    folder = tmp_path / "cache"
    build(corpus, folder, report=lines.append)
    build(corpus, folder, report=lines.append)
    assert len(lines) == 1
    assert "60 documents" in lines[0]
    build(corpus, folder, report=lines.append, max_documents=5)
    build(corpus, folder, Tokenizer.bytes(num_sentinels=10), report=lines.append)
    changed = corpus / "00.txt"
    os.utime(changed, ns=(1, 1))
    build(corpus, folder, report=lines.append)
    changed.write_text("other text")
    build(corpus, folder, report=lines.append)
    assert len(lines) == len(finished(folder)) == 5


def test_skips_are_reported_and_remembered(corpus, tmp_path):
    (corpus / "bad.txt").write_bytes(b"\xff")
    (corpus / "empty.txt").write_bytes(b"")
    lines = []
    made = build(corpus, tmp_path / "cache", report=lines.append)
    assert made.skipped == "1 empty, 1 not UTF-8"
    assert lines[0].endswith("skipped: 1 empty, 1 not UTF-8")
    assert build(corpus, tmp_path / "cache").skipped == made.skipped


def test_a_corpus_without_text_is_refused_and_leaves_nothing(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"'texts' has no text in .*; skipped: 1 not UTF-8"):
        build(folder, tmp_path / "cache")
    assert finished(tmp_path / "cache") == []


MANIFESTS = {"cut off": "[", "list": "[]", "null": "null", "empty": "{}", "files": '{"files": [1]}'}


@pytest.mark.parametrize("damage", ["cut", "zeroed", "offsets", "missing", *MANIFESTS])
def test_a_damaged_cache_is_built_again(corpus, tmp_path, damage):
    folder = tmp_path / "cache"
    good = np.array(build(corpus, folder).tokens)
    (made,) = [folder / name for name in finished(folder)]
    if damage == "cut":
        os.truncate(made / "tokens.bin", 100)
    elif damage == "zeroed":
        with (made / "tokens.bin").open("r+b") as file:
            file.seek(500)
            file.write(bytes(400))
    elif damage == "offsets":
        np.save(made / "offsets.npy", np.load(made / "offsets.npy")[::-1])
    elif damage == "missing":
        (made / "hashes.npy").unlink()
    else:
        (made / "manifest.json").write_text(MANIFESTS[damage])
    lines = []
    assert np.array_equal(build(corpus, folder, report=lines.append).tokens, good)
    assert sum("is damaged, and is built again" in line for line in lines) == 1
    lines.clear()
    build(corpus, folder, report=lines.append)
    assert not lines


def test_a_large_file_is_checked_at_both_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "CHECKED", 100)
    path = tmp_path / "file"
    path.write_bytes(bytes(1000))
    good = token_cache._checksum(path)
    for place, seen in ((0, True), (49, True), (500, False), (950, True), (999, True)):
        changed = bytearray(1000)
        changed[place] = 1
        path.write_bytes(changed)
        assert (token_cache._checksum(path) != good) == seen


def test_a_folder_that_cannot_be_written_is_an_error(corpus, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="Cannot write the cache in"):
        build(corpus, tmp_path / "file")


def test_progress_is_reported_while_building(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "REPORT_SECONDS", 0.0)
    monkeypatch.setattr(token_cache, "_BATCH", 25)
    lines = []
    build(corpus, tmp_path / "cache", report=lines.append)
    assert [line.split(",")[0] for line in lines] == [
        "Tokenizing corpus: 25 documents",
        "Tokenizing corpus: 50 documents",
        "Tokenizing corpus: 60 documents",
        "Tokenized corpus: 60 documents",
    ]


def test_memory_while_building_is_few_bytes_per_document(tmp_path, corpus, monkeypatch):
    def peak(count):
        documents = (Document(text=f"text {number}") for number in range(count))
        monkeypatch.setattr(sources, "read", lambda source, **settings: documents)
        tracemalloc.start()
        build(corpus, tmp_path / str(count))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    # Kept: a length and a hash; at the end the offsets besides.
    assert (peak(40_000) - peak(10_000)) / 30_000 < 35


def _build_in_process(corpus, folder, start, answers):
    lines = []
    start.wait()
    made = build(corpus, folder, report=lines.append)
    answers.put((int(made.tokens.astype(np.int64).sum()), any("Tokenized" in x for x in lines)))


def test_processes_that_build_at_once_make_one_cache(corpus, tmp_path):
    context = multiprocessing.get_context("spawn")
    start, answers = context.Event(), context.Queue()
    arguments = (corpus, tmp_path / "cache", start, answers)
    processes = [context.Process(target=_build_in_process, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    start.set()
    found = [answers.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    assert len({total for total, _ in found}) == 1
    assert sum(built for _, built in found) == 1
    assert len(finished(tmp_path / "cache")) == 1


def _build_slowly(corpus, folder):
    # Every document is written and flushed alone, with time to be killed in between.
    token_cache._BATCH = 1
    encode = Tokenizer.encode_plain

    def slowly(self, texts):
        time.sleep(0.02)
        return encode(self, texts)

    Tokenizer.encode_plain = slowly
    build(corpus, folder)


def test_a_builder_killed_in_the_middle_leaves_no_trace(corpus, tmp_path):
    context = multiprocessing.get_context("spawn")
    folder = tmp_path / "cache"
    process = context.Process(target=_build_slowly, args=(corpus, folder))
    process.start()
    deadline = time.monotonic() + 60
    while not list(folder.glob("*.part-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(finished(folder)) == 1  # its unfinished part
    assert not list(folder.glob("*/manifest.json"))
    assert len(build(corpus, folder).hashes_D) == 60
    (made,) = finished(folder)
    assert ".part-" not in made
    assert json.loads((folder / made / "manifest.json").read_text())["dtype"] == "uint16"


def test_equal_documents_share_a_hash_and_sections_of_a_file_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "WHOLE", 100)
    monkeypatch.setattr(readers, "SECTION", 50)
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "large.txt").write_text("".join(f"line {number}\n" for number in range(100)))
    for name in ("one.txt", "same.txt"):
        (folder / name).write_text("the same words")
    hashes = build(folder, tmp_path / "cache").hashes_D.tolist()
    assert len(hashes) > 10
    assert len(set(hashes)) == len(hashes) - 1
    assert hashes[-1] == hashes[-2] != hashes[0]
