"""Distillation: train on the targets and on a teacher's probabilities (section 4.2).

The teacher's log-probabilities are part of the batch, so the training loop does not change. They
come from the teacher, or from a cache on disk, with which a second student needs no teacher.

A cache is a folder of memory-mapped files, with K tokens for each of P target positions in R rows:
    words.bin      uint16 or uint32 [P, K], the most likely tokens
    expected.bin   float32 [P, K + 1], their log-probabilities, and that of all other tokens
    offsets.npy    int64 [R + 1], where each row of targets begins
    rows.npy       uint64 [R], a hash of each row's inputs and targets
    manifest.json  the `CacheKey`, and the sizes of the files; written last
Rows are in the order of training, on any number of processes. The folder is created atomically. It
is refused if teacher, tokenizer, seed, temperature, precision or K differ, or a row differs.

Shapes: B batch, T target, V vocabulary, K top tokens of the teacher.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from switchlm.data.batch import Batch, BatchSource
from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import CheckpointError
from switchlm.files import Report, building
from switchlm.model.precision import Precision, set_precision
from switchlm.model.routing import ModelOutput
from switchlm.model.transformer import SwitchTransformer, forward_batch
from switchlm.parallel.apply import full_logits
from switchlm.training.step import target_cross_entropy

FORMAT = 1
REPORT_EVERY = 100  # batches
_MANIFEST = "manifest.json"
_REMEDY = "Give another --cache-logits, or delete it to build it again."


@dataclass(frozen=True, kw_only=True)
class TeacherBatch(Batch):
    """A batch with a teacher's log-probabilities.

    log_probs_BTK: float32. Of all tokens (K = V) if token_ids_BTK is None; else of those tokens,
        and last, at index K, of all other tokens together (-inf if there are none).
    token_ids_BTK: int64, the teacher's K most likely tokens.
    """

    log_probs_BTK: Tensor
    token_ids_BTK: Tensor | None = None


def soft_cross_entropy(logits_BTV: Tensor, log_probs_BTV: Tensor) -> Tensor:
    """Return -sum p log q of each target, losses_BT in nats.

    p are the teacher's probabilities (log_probs_BTV their logarithms), q = softmax(logits). The
    gradient is q - p; the minimum is the entropy of p.
    """
    return -(log_probs_BTV.exp() * log_softmax(logits_BTV.float(), -1)).sum(-1)


def top_soft_cross_entropy(
    logits_BTV: Tensor, token_ids_BTK: Tensor, log_probs_BTK1: Tensor
) -> Tensor:
    """Return the same from the teacher's top K tokens, losses_BT in nats.

    All other tokens count as one class: the student learns their total probability, and only the
    hard loss divides it among them. Nothing is renormalised, so tokens outside the K do not become
    impossible. Equal to the full loss if K = V, and never larger.
    """
    logits_BTV = logits_BTV.float()
    total_BT1 = logits_BTV.logsumexp(-1, keepdim=True)
    found_BTK = logits_BTV.gather(-1, token_ids_BTK) - total_BT1
    loss_BT = -(log_probs_BTK1[..., :-1].exp() * found_BTK).sum(-1)
    if token_ids_BTK.shape[-1] == logits_BTV.shape[-1]:
        return loss_BT
    others_BTV = logits_BTV.scatter(-1, token_ids_BTK, -torch.inf)
    others_BT = others_BTV.logsumexp(-1) - total_BT1.squeeze(-1)
    return loss_BT - log_probs_BTK1[..., -1].exp() * others_BT


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """The objective: hard_weight x cross-entropy + soft_weight x soft cross-entropy.

    temperature: divides the logits of both distributions in the soft part, whose loss is then
        multiplied by its square, so that gradients keep their size (Hinton et al. 2015). It must be
        the temperature of the `Teacher`.
    """

    hard_weight: float = 0.75
    soft_weight: float = 0.25
    temperature: float = 1.0

    def __call__(self, output: ModelOutput, batch: Batch) -> Tensor:
        """Return the loss summed over the targets of a TeacherBatch."""
        assert isinstance(batch, TeacherBatch), "batches come from a TeacherLoader"
        logits_BTV = full_logits(output.logits_BTV).float() / self.temperature
        if batch.token_ids_BTK is None:
            losses_BT = soft_cross_entropy(logits_BTV, batch.log_probs_BTK)
        else:
            losses_BT = top_soft_cross_entropy(logits_BTV, batch.token_ids_BTK, batch.log_probs_BTK)
        soft = torch.where(batch.target_mask_BT, losses_BT, 0.0).sum() * self.temperature**2
        return self.hard_weight * target_cross_entropy(output, batch) + self.soft_weight * soft


class Teacher:
    """Adds the log-probabilities of a model to batches; the model is not sharded, nor trained."""

    def __init__(
        self,
        model: SwitchTransformer,
        *,
        temperature: float = 1.0,
        precision: Precision = "float32",
        top_k: int | None = None,
    ) -> None:
        """top_k: keep the K most likely tokens for each target; None keeps all."""
        self.model = model.eval()
        set_precision(model, precision)
        self.temperature, self.top_k = temperature, top_k

    @torch.no_grad()
    def __call__(self, batch: Batch) -> TeacherBatch:
        """Return the batch with log-probabilities, on the teacher's device."""
        batch = batch.to(self.model.embedding.weight.device)
        logits_BTV = forward_batch(self.model, batch).logits_BTV
        log_probs_BTV = log_softmax(logits_BTV.float() / self.temperature, -1)
        if self.top_k is None:
            return TeacherBatch(**vars(batch), log_probs_BTK=log_probs_BTV)
        found_BTK, token_ids_BTK = log_probs_BTV.topk(self.top_k, dim=-1)
        others_BT1 = log_probs_BTV.scatter(-1, token_ids_BTK, -torch.inf).logsumexp(
            -1, keepdim=True
        )
        log_probs_BTK = torch.cat([found_BTK, others_BT1], -1)
        return TeacherBatch(**vars(batch), log_probs_BTK=log_probs_BTK, token_ids_BTK=token_ids_BTK)


class TeacherLoader:
    """A loader whose training batches have a teacher's log-probabilities; held-out ones do not.

    add_teacher: takes the number of a batch and the batch, returns the TeacherBatch.
    """

    def __init__(
        self, source: BatchSource, add_teacher: Callable[[int, Batch], TeacherBatch]
    ) -> None:
        self.source, self.add_teacher = source, add_teacher

    @property
    def sources(self) -> tuple[str, ...]:
        """The names that Batch.source_B indexes."""
        return self.source.sources

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the texts, if there are any."""
        return self.source.tokenizer

    def iterate(self, start_step: int) -> Generator[tuple[int, Batch], None, None]:
        """Yield (number, TeacherBatch) without end."""
        batches = self.source.iterate(start_step)
        try:
            for number, batch in batches:
                yield number, self.add_teacher(number, batch)
        finally:
            batches.close()

    def held_out(self, num_batches: int) -> list[Batch]:
        """Return a fixed set of batches for evaluation."""
        return self.source.held_out(num_batches)


@dataclass(frozen=True, kw_only=True)
class CacheKey:
    """What a cache depends on besides the rows.

    teacher: hash of its weights.
    tokenizer: hash of its file.
    seed: of the run, which decides the order of the rows.
    temperature, precision, top_k: of the `Teacher`.
    """

    teacher: str
    tokenizer: str
    seed: int
    temperature: float
    precision: str
    top_k: int


class LogitCache:
    """A finished cache.

    num_rows: rows that the run will read.
    share, num_shares: index of this process's share of every batch, and the number of shares.
    """

    def __init__(
        self, folder: Path, key: CacheKey, num_rows: int, *, share: int = 0, num_shares: int = 1
    ) -> None:
        """Raises CheckpointError if the cache has another key, is damaged, or is too small."""
        self.folder, self.share, self.num_shares = folder, share, num_shares
        manifest = _read_manifest(folder)
        for name, wanted in asdict(key).items():
            found = manifest["key"].get(name)
            if found != wanted:
                raise self._refused(
                    f"does not match this run: its {name} is {_short(found)}, the run's "
                    f"{_short(wanted)}"
                )
        for name, size in manifest["sizes"].items():
            path = folder / name
            there = path.stat().st_size if path.is_file() else 0
            if there != size:
                raise self._refused(f"is damaged: {name} has {there:,} bytes of {size:,}")
        self.offsets = np.load(folder / "offsets.npy", allow_pickle=False)
        self.rows = np.load(folder / "rows.npy", allow_pickle=False)
        if len(self.rows) < num_rows:
            raise self._refused(
                f"holds {len(self.rows):,} rows and the run needs {num_rows:,}: it was built for "
                "fewer steps"
            )
        shape = (int(self.offsets[-1]), key.top_k)
        self.token_ids: np.ndarray = np.memmap(
            folder / "words.bin", dtype=manifest["dtype"], mode="r", shape=shape
        )
        self.log_probs: np.ndarray = np.memmap(
            folder / "expected.bin", dtype=np.float32, mode="r", shape=(shape[0], shape[1] + 1)
        )

    def add_teacher(self, number: int, batch: Batch) -> TeacherBatch:
        """Return this process's rows of the run's batch `number` with log-probabilities."""
        num_rows, length = batch.targets_BT.shape
        first = (number * self.num_shares + self.share) * num_rows
        rows = slice(first, first + num_rows)
        if not np.array_equal(self.rows[rows], _hash_rows(batch)):
            raise self._refused(
                f"was built from other text: the rows of batch {number} differ from this run's"
            )
        positions = slice(self.offsets[rows.start], self.offsets[rows.stop])
        shape = (num_rows, length, -1)
        token_ids = self.token_ids[positions].astype(np.int64).reshape(shape)
        log_probs = np.array(self.log_probs[positions]).reshape(shape)
        return TeacherBatch(
            **vars(batch),
            log_probs_BTK=torch.from_numpy(log_probs),
            token_ids_BTK=torch.from_numpy(token_ids),
        )

    def _refused(self, why: str) -> CheckpointError:
        return CheckpointError(f"The cache of logits {str(self.folder)!r} {why}. {_REMEDY}")


def build_cache(
    folder: Path,
    key: CacheKey,
    teacher: Teacher,
    source: BatchSource,
    num_batches: int,
    should_stop: Callable[[], bool] = lambda: False,
    report: Report = lambda line: None,
) -> None:
    """Write the cache of the first `num_batches` of `source`, unless it exists.

    source: the batches of all processes together.
    should_stop: once true, the unfinished cache is deleted.
    """
    if folder.exists():
        return
    with building(folder, report) as part:
        if not folder.exists():
            part.mkdir()
            batches = _first(source, num_batches, should_stop, report)
            if not _write(part, key, teacher, batches, num_batches):
                shutil.rmtree(part)


def hash_weights(module: nn.Module) -> str:
    """Return a hash of the names, dtypes, shapes and values of all weights."""
    state = hashlib.blake2b(digest_size=16)
    for name, tensor in module.state_dict().items():
        state.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        state.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return state.hexdigest()


def _write(
    folder: Path, key: CacheKey, teacher: Teacher, batches: Iterator[Batch], num_batches: int
) -> bool:
    """Write all files of a cache; return False if there were fewer batches."""
    dtype = np.uint16 if teacher.model.config.vocabulary_size <= 2**16 else np.uint32
    lengths: list[int] = []
    rows: list[np.ndarray] = []
    with (
        (folder / "words.bin").open("wb") as token_ids,
        (folder / "expected.bin").open("wb") as log_probs,
    ):
        for batch in batches:
            answer = teacher(batch)
            assert answer.token_ids_BTK is not None, "the teacher of a cache has a top_k"
            token_ids.write(answer.token_ids_BTK.cpu().numpy().astype(dtype).tobytes())
            log_probs.write(answer.log_probs_BTK.cpu().numpy().tobytes())
            lengths += [batch.targets_BT.shape[1]] * len(batch.targets_BT)
            rows.append(_hash_rows(batch))
    if len(rows) < num_batches:
        return False
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    np.save(folder / "offsets.npy", offsets, allow_pickle=False)
    np.save(folder / "rows.npy", np.concatenate(rows), allow_pickle=False)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    manifest = {
        "format": FORMAT, "key": asdict(key), "dtype": np.dtype(dtype).name, "sizes": sizes
    }  # fmt: skip
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    return True


def _first(
    source: BatchSource, count: int, should_stop: Callable[[], bool], report: Report
) -> Iterator[Batch]:
    """Yield the first `count` batches of a source, and report progress."""
    with closing(source.iterate(0)) as batches:
        for number in range(count):
            if should_stop():
                return
            if number and number % REPORT_EVERY == 0:
                report(f"Caching the teacher's logits: {number:,} of {count:,} batches")
            yield next(batches)[1]


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] == FORMAT:
            return manifest
        reason = f"its format is {manifest['format']!r}, not {FORMAT}"
    except FileNotFoundError:
        reason = f"it has no {_MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"its {_MANIFEST} cannot be read ({error})"
    raise CheckpointError(f"{str(folder)!r} is no cache of logits: {reason}. {_REMEDY}")


def _hash_rows(batch: Batch) -> np.ndarray:
    """Return a hash of each row, uint64."""
    parts = [batch.inputs_BS, batch.targets_BT, batch.target_mask_BT.long()]
    table = torch.cat(parts, 1).cpu().numpy()
    hashes = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in table]
    return np.frombuffer(b"".join(hashes), dtype="<u8")


def _short(value: object) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) > 16 else repr(value)
