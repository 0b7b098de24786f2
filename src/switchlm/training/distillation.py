"""Distillation: learn from the tokens that follow, and from what a teacher expects (section 4.2).

What a teacher says of a batch is part of the batch, so that the loop is the one of all training. It
may come from the teacher, or from a cache on disk, so that a second student costs no teacher.

A cache is a folder, memory-mapped, of K tokens for each of P target positions in R rows:
    words.bin      uint16 or uint32 [P, K], the likeliest tokens
    expected.bin   float32 [P, K + 1], their log-probabilities, and that of all others together
    offsets.npy    int64 [R + 1], where each row of targets begins
    rows.npy       uint64 [R], a hash of each row's inputs and targets
    manifest.json  whose they are, and the sizes of the files; written last
Rows stand in the order of training, whatever processes share them out. The folder appears whole or
not at all. It is refused where teacher, tokenizer, seed, temperature or K is another, and at any
row that is not the row of the run.

Shapes: B batch, T target, V vocabulary, K tokens named by the teacher.
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
from switchlm.errors import CheckpointError
from switchlm.files import Report, building
from switchlm.model.routing import ModelOutput
from switchlm.model.transformer import SwitchTransformer, forward_batch
from switchlm.parallel.apply import gathered
from switchlm.training.config import Precision
from switchlm.training.step import computing, set_router_dtype, target_cross_entropy

FORMAT = 1
REPORT_EVERY = 100  # batches
_MANIFEST = "manifest.json"
_REMEDY = "Give another --cache-logits, or delete it to have it made anew."


@dataclass(frozen=True, kw_only=True)
class TeacherBatch(Batch):
    """A batch, and what a teacher says of each of its targets.

    expected_BTK: float32 log-probabilities. Of all tokens (K = V) where token_ids_BTK is None; else
        of those tokens, and behind them, in place K + 1, of all other tokens together (-inf if none
        are left).
    token_ids_BTK: int64, the tokens that the teacher finds likeliest.
    """

    expected_BTK: Tensor
    token_ids_BTK: Tensor | None = None


def soft_cross_entropy(logits_BTV: Tensor, expected_BTV: Tensor) -> Tensor:
    """Return -sum p log q of each target, losses_BT in nats.

    p are the teacher's probabilities (expected_BTV their logarithms), q = softmax(logits). The
    gradient is q - p; the least value is the entropy of p.
    """
    return -(expected_BTV.exp() * log_softmax(logits_BTV.float(), -1)).sum(-1)


def top_soft_cross_entropy(
    logits_BTV: Tensor, token_ids_BTK: Tensor, expected_BTK1: Tensor
) -> Tensor:
    """Return the same where the teacher names K tokens only, losses_BT in nats.

    All other tokens count as one: their joint probability is asked of the student, and how it
    shares it out among them is left to the hard loss. Nothing is renormalised, so that a word
    outside the K is not taught to be impossible. It is the full loss where K = V, and never more
    than that.
    """
    logits_BTV = logits_BTV.float()
    total_BT1 = logits_BTV.logsumexp(-1, keepdim=True)
    found_BTK = logits_BTV.gather(-1, token_ids_BTK) - total_BT1
    loss_BT = -(expected_BTK1[..., :-1].exp() * found_BTK).sum(-1)
    if token_ids_BTK.shape[-1] == logits_BTV.shape[-1]:
        return loss_BT
    others_BTV = logits_BTV.scatter(-1, token_ids_BTK, -torch.inf)
    others_BT = others_BTV.logsumexp(-1) - total_BT1.squeeze(-1)
    return loss_BT - expected_BTK1[..., -1].exp() * others_BT


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """The objective: hard_weight x cross-entropy + soft_weight x soft cross-entropy.

    temperature: softens both distributions of the soft part, which is then multiplied by its square
        so that its gradients keep their size (Hinton et al. 2015). The batches are taught at it.
    """

    hard_weight: float = 0.75
    soft_weight: float = 0.25
    temperature: float = 1.0

    def __call__(self, output: ModelOutput, batch: Batch) -> Tensor:
        """Return the loss summed over the targets of a TeacherBatch."""
        assert isinstance(batch, TeacherBatch), "batches come from a TeacherLoader"
        logits_BTV = gathered(output.logits_BTV).float() / self.temperature
        if batch.token_ids_BTK is None:
            losses_BT = soft_cross_entropy(logits_BTV, batch.expected_BTK)
        else:
            losses_BT = top_soft_cross_entropy(logits_BTV, batch.token_ids_BTK, batch.expected_BTK)
        soft = torch.where(batch.target_mask_BT, losses_BT, 0.0).sum() * self.temperature**2
        return self.hard_weight * target_cross_entropy(output, batch) + self.soft_weight * soft


class Teacher:
    """A model that says of batches what it expects; whole on its device, and never changed."""

    def __init__(
        self,
        model: SwitchTransformer,
        *,
        temperature: float = 1.0,
        precision: Precision = "float32",
        top_k: int | None = None,
    ) -> None:
        """top_k: so many tokens for each target; None says all."""
        self.model = model.eval()
        set_router_dtype(model, precision)
        self.temperature, self.precision, self.top_k = temperature, precision, top_k

    @torch.no_grad()
    def __call__(self, batch: Batch) -> TeacherBatch:
        """Return the batch, taught, on the teacher's device."""
        batch = batch.to(self.model.embedding.weight.device)
        with computing(self.precision, batch.inputs_BS.device):
            logits_BTV = forward_batch(self.model, batch).logits_BTV
        expected_BTV = log_softmax(logits_BTV.float() / self.temperature, -1)
        if self.top_k is None:
            return TeacherBatch(**vars(batch), expected_BTK=expected_BTV)
        found_BTK, token_ids_BTK = expected_BTV.topk(self.top_k, dim=-1)
        others_BT1 = expected_BTV.scatter(-1, token_ids_BTK, -torch.inf).logsumexp(-1, keepdim=True)
        expected_BTK = torch.cat([found_BTK, others_BT1], -1)
        return TeacherBatch(**vars(batch), expected_BTK=expected_BTK, token_ids_BTK=token_ids_BTK)


class TeacherLoader:
    """A source whose training batches are taught; those held out are as they were.

    teach: from the number of a batch and the batch to the batch taught.
    """

    def __init__(self, source: BatchSource, teach: Callable[[int, Batch], TeacherBatch]) -> None:
        self.source, self.teach = source, teach

    @property
    def sources(self) -> tuple[str, ...]:
        """The names that Batch.source_B indexes."""
        return self.source.sources

    def iterate(self, start_step: int) -> Generator[tuple[int, Batch], None, None]:
        """Yield (number, taught batch) without end."""
        batches = self.source.iterate(start_step)
        try:
            for number, batch in batches:
                yield number, self.teach(number, batch)
        finally:
            batches.close()

    def held_out(self, num_batches: int) -> list[Batch]:
        """Return a fixed set of batches for evaluation."""
        return self.source.held_out(num_batches)


@dataclass(frozen=True, kw_only=True)
class CacheKey:
    """What a cache depends on besides the rows: digests of teacher and tokenizer, and numbers.

    seed is that of the run, which decides the order of the rows.
    """

    teacher: str
    tokenizer: str
    seed: int
    temperature: float
    precision: str
    top_k: int


class LogitCache:
    """A finished cache.

    num_rows: how many the run will read.
    share, num_shares: which share of every batch this process reads, of how many.
    """

    def __init__(
        self, folder: Path, key: CacheKey, num_rows: int, *, share: int = 0, num_shares: int = 1
    ) -> None:
        """Raises CheckpointError where the cache is another's, damaged, cut short or too small."""
        self.folder, self.share, self.num_shares = folder, share, num_shares
        manifest = _read_manifest(folder)
        for name, wanted in asdict(key).items():
            found = manifest["key"].get(name)
            if found != wanted:
                raise self._refused(
                    f"does not fit this run: its {name} is {_short(found)}, the run's "
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
                f"holds {len(self.rows):,} rows and the run needs {num_rows:,}: it was made for "
                "fewer steps"
            )
        shape = (int(self.offsets[-1]), key.top_k)
        self.token_ids: np.ndarray = np.memmap(
            folder / "words.bin", dtype=manifest["dtype"], mode="r", shape=shape
        )
        self.expected: np.ndarray = np.memmap(
            folder / "expected.bin", dtype=np.float32, mode="r", shape=(shape[0], shape[1] + 1)
        )

    def teach(self, number: int, batch: Batch) -> TeacherBatch:
        """Return this process's rows of the run's batch `number`, taught."""
        num_rows, length = batch.targets_BT.shape
        first = (number * self.num_shares + self.share) * num_rows
        rows = slice(first, first + num_rows)
        if not np.array_equal(self.rows[rows], _hash_rows(batch)):
            raise self._refused(
                f"was made of other text: the rows of batch {number} differ from those of this run"
            )
        places = slice(self.offsets[rows.start], self.offsets[rows.stop])
        shape = (num_rows, length, -1)
        token_ids = self.token_ids[places].astype(np.int64).reshape(shape)
        expected = np.array(self.expected[places]).reshape(shape)
        return TeacherBatch(
            **vars(batch),
            expected_BTK=torch.from_numpy(expected),
            token_ids_BTK=torch.from_numpy(token_ids),
        )

    def _refused(self, why: str) -> CheckpointError:
        return CheckpointError(f"The cache of logits {str(self.folder)!r} {why}. {_REMEDY}")


def build(
    folder: Path,
    key: CacheKey,
    teacher: Teacher,
    source: BatchSource,
    num_batches: int,
    should_stop: Callable[[], bool] = lambda: False,
    report: Report = lambda line: None,
) -> None:
    """Let the teacher answer the first `num_batches` of `source`, unless the cache is there.

    source: the batches of all processes together. Once `should_stop` says so, nothing is left.
    """
    if folder.exists():
        return
    with building(folder, report) as part:
        if not folder.exists():
            part.mkdir()
            batches = _first(source, num_batches, should_stop, report)
            if not _write(part, key, teacher, batches, num_batches):
                shutil.rmtree(part)


def digest(module: nn.Module) -> str:
    """Return a hash of all weights, equal for equal ones."""
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
        (folder / "expected.bin").open("wb") as expected,
    ):
        for batch in batches:
            taught = teacher(batch)
            assert taught.token_ids_BTK is not None, "the teacher of a cache has a top_k"
            token_ids.write(_numbers(taught.token_ids_BTK).astype(dtype).tobytes())
            expected.write(_numbers(taught.expected_BTK).tobytes())
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
    """Yield the first batches of a source, and say now and then how many of them are done."""
    with closing(source.iterate(0)) as batches:
        for number in range(count):
            if should_stop():
                return
            if number and number % REPORT_EVERY == 0:
                report(f"The teacher answers: {number:,} of {count:,} batches")
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
    table = np.ascontiguousarray(_numbers(torch.cat(parts, 1)))
    hashes = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in table]
    return np.frombuffer(b"".join(hashes), dtype="<u8")


def _numbers(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy()


def _short(value: object) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) > 16 else repr(value)
