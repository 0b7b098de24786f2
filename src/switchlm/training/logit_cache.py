"""What a teacher says of every training batch, on disk: a second student costs no teacher.

A cache is a folder, memory-mapped, of K tokens for each of P target positions in R rows:
    words.bin      uint16 or uint32 [P, K], the likeliest tokens
    expected.bin   float32 [P, K + 1], their log-probabilities, and that of all others together
    offsets.npy    int64 [R + 1], where each row of targets begins
    rows.npy       uint64 [R], a hash of each row's inputs and targets
    manifest.json  whose they are, and the sizes of the files; written last
Rows stand in the order of training, whatever processes share them out. The folder appears whole or
not at all. It is refused where teacher, tokenizer, seed, temperature or K is another, and at any
row that is not the row of the run.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from switchlm.data.batch import Batch, BatchSource
from switchlm.errors import CheckpointError
from switchlm.files import Report, building
from switchlm.training.distillation import Teacher, TeacherBatch

FORMAT = 1
REPORT_EVERY = 100  # batches
_MANIFEST = "manifest.json"
_REMEDY = "Give another --cache-logits, or delete it to have it made anew."


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

    num_rows: how many the run will read. share of num_shares: which of every batch this process
        reads.
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
                raise CheckpointError(
                    f"The cache of logits {str(folder)!r} does not fit this run: its {name} is "
                    f"{_short(found)}, the run's {_short(wanted)}. {_REMEDY}"
                )
        for name, size in manifest["sizes"].items():
            path = folder / name
            there = path.stat().st_size if path.is_file() else 0
            if there != size:
                raise CheckpointError(
                    f"The cache of logits {str(folder)!r} is damaged: {name} has {there:,} bytes "
                    f"of {size:,}. {_REMEDY}"
                )
        self.offsets = np.load(folder / "offsets.npy", allow_pickle=False)
        self.rows = np.load(folder / "rows.npy", allow_pickle=False)
        if len(self.rows) < num_rows:
            raise CheckpointError(
                f"The cache of logits {str(folder)!r} holds {len(self.rows):,} rows and the run "
                f"needs {num_rows:,}: it was made for fewer steps. {_REMEDY}"
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
            raise CheckpointError(
                f"The cache of logits {str(self.folder)!r} was made of other text: the rows of "
                f"batch {number} differ from those of this run. {_REMEDY}"
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
