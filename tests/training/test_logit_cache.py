"""The cache returns the teacher's log-probabilities, and is refused if it is of another run."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from switchlm.data.pretraining.loader import Loader
from switchlm.errors import CheckpointError
from switchlm.model.presets import preset
from switchlm.model.transformer import SwitchTransformer
from switchlm.training.distillation import CacheKey, LogitCache, Teacher, build_cache, hash_weights

K, BATCHES = 6, 3


def a_teacher(seed: int = 0) -> Teacher:
    torch.manual_seed(seed)
    return Teacher(SwitchTransformer(preset("nano")), top_k=K)


def key_of(teacher: Teacher, **changes: object) -> CacheKey:
    key = CacheKey(
        teacher=hash_weights(teacher.model),
        tokenizer="bytes",
        seed=0,
        temperature=1.0,
        precision="float32",
        top_k=K,
    )
    return dataclasses.replace(key, **changes)


@pytest.fixture(scope="module")
def made(tmp_path_factory, text_loader) -> Path:
    folder = tmp_path_factory.mktemp("caches") / "logits"
    teacher = a_teacher()
    build_cache(folder, key_of(teacher), teacher, text_loader, BATCHES)
    return folder


@pytest.fixture
def copy(made, tmp_path) -> Path:
    """A cache to spoil."""
    return Path(shutil.copytree(made, tmp_path / "copy"))


def rows(loader: Loader, batches: int = BATCHES) -> int:
    return loader.batch_size * batches


def test_it_returns_what_the_teacher_returned(made, text_loader):
    teacher = a_teacher()
    cache = LogitCache(made, key_of(teacher), rows(text_loader))
    for number in (2, 0, 1):
        batch = text_loader.batch(number)
        found, wanted = cache.add_teacher(number, batch), teacher(batch)
        assert torch.equal(found.token_ids_BTK, wanted.token_ids_BTK)
        assert torch.equal(found.log_probs_BTK, wanted.log_probs_BTK)
        assert torch.equal(found.inputs_BS, batch.inputs_BS)


def test_processes_read_their_shares_of_it(made, text_loader):
    key = key_of(a_teacher())
    whole = LogitCache(made, key, rows(text_loader)).add_teacher(1, text_loader.batch(1))
    parts = [
        LogitCache(made, key, rows(text_loader), share=rank, num_shares=2).add_teacher(
            1, text_loader.share(rank, 2).batch(1)
        )
        for rank in range(2)
    ]
    assert torch.equal(torch.cat([part.token_ids_BTK for part in parts]), whole.token_ids_BTK)


def test_it_is_made_once(made, text_loader):
    """Another teacher does not change an existing cache."""
    before = (made / "manifest.json").stat().st_mtime_ns
    other = a_teacher(1)
    build_cache(made, key_of(other), other, text_loader, BATCHES)
    assert (made / "manifest.json").stat().st_mtime_ns == before


def test_a_teacher_that_fails_leaves_nothing(tmp_path, text_loader):
    teacher = a_teacher()

    class Failing(Teacher):
        def __call__(self, batch):
            if asked.pop():
                raise KeyboardInterrupt
            return teacher(batch)

    asked = [True, False]
    failing = Failing(teacher.model, top_k=K)
    with pytest.raises(KeyboardInterrupt):
        build_cache(tmp_path / "logits", key_of(teacher), failing, text_loader, BATCHES)
    assert not (tmp_path / "logits").exists()
    assert not list(tmp_path.glob("*.part-*"))
    build_cache(tmp_path / "logits", key_of(teacher), teacher, text_loader, BATCHES)
    LogitCache(tmp_path / "logits", key_of(teacher), rows(text_loader))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "its seed is 0, the run's 1"),
        ({"temperature": 2.0}, "its temperature is 1.0, the run's 2.0"),
        ({"top_k": 5}, "its top_k is 6, the run's 5"),
        ({"tokenizer": "unigram"}, "its tokenizer is 'bytes'"),
        ({"precision": "bfloat16"}, "its precision is"),
    ],
)
def test_another_run_s_cache_is_refused(made, text_loader, changes, message):
    with pytest.raises(CheckpointError, match=message):
        LogitCache(made, key_of(a_teacher(), **changes), rows(text_loader))


def test_another_teacher_s_cache_is_refused(made, text_loader):
    with pytest.raises(CheckpointError, match=r"its teacher is .*the run's .*delete it"):
        LogitCache(made, key_of(a_teacher(1)), rows(text_loader))


def test_a_cache_for_fewer_steps_is_refused(made, text_loader):
    with pytest.raises(CheckpointError, match="holds 12 rows and the run needs 16"):
        LogitCache(made, key_of(a_teacher()), rows(text_loader, BATCHES + 1))


def test_other_text_is_refused(made, text_loader):
    cache = LogitCache(made, key_of(a_teacher()), rows(text_loader))
    with pytest.raises(CheckpointError, match="other text: the rows of batch 1 differ"):
        cache.add_teacher(1, text_loader.batch(2))


@pytest.mark.parametrize("name", ["words.bin", "expected.bin", "offsets.npy", "rows.npy"])
def test_a_cache_cut_short_is_refused(copy, text_loader, name):
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[:-8])
    with pytest.raises(CheckpointError, match=f"damaged: {name} has .* bytes of"):
        LogitCache(copy, key_of(a_teacher()), rows(text_loader))


def test_a_folder_that_is_no_cache_is_refused(copy, tmp_path, text_loader):
    key = key_of(a_teacher())
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="is no cache of logits: it has no manifest"):
        LogitCache(tmp_path / "empty", key, 1)
    manifest = copy / "manifest.json"
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**values, "format": 9}))
    with pytest.raises(CheckpointError, match="its format is 9, not 1"):
        LogitCache(copy, key, 1)
    manifest.write_text("{")
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read"):
        LogitCache(copy, key, 1)


def test_the_hash_depends_on_every_weight():
    one, two = a_teacher().model, a_teacher().model
    assert hash_weights(one) == hash_weights(two)
    with torch.no_grad():
        two.decoder.final_norm.weight[3] += 1e-6
    assert hash_weights(one) != hash_weights(two)
