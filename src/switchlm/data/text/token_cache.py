"""The token cache: the text of a source, tokenized once, and memory-mapped.

A cache is a folder named by a hash of all that it depends on:
    tokens.bin     uint16 or uint32, documents concatenated, each followed by the end token
    offsets.npy    int64 [documents + 1], where each document begins
    hashes.npy     uint64 [documents], of the document's identity, for the held-out split
    manifest.json  sizes and checksums, the source, and what was skipped; written last
It is built under another name, with a lock, and renamed, so that readers see a complete cache or
none, even if several processes build it or one is killed.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import time
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from switchlm.data.config import Columns
from switchlm.data.order import Int64, UInt64
from switchlm.data.text import sources
from switchlm.data.text.readers import Document
from switchlm.data.text.sources import Source
from switchlm.data.text.tokenizer import Tokenizer
from switchlm.errors import DataError
from switchlm.files import Report, building

FORMAT = 2
MANIFEST = "manifest.json"
DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
CHECKED = 2**31  # bytes of a file that are checked when it is opened, in a second or two
REPORT_SECONDS = 2.0
_BATCH = 256  # documents tokenized at once


@dataclass(frozen=True, kw_only=True)
class TokenCache:
    """The tokens of one source in a folder: `tokens` is memory-mapped, D documents.

    characters: of the text.
    """

    folder: Path
    tokens: np.ndarray
    offsets: Int64
    hashes_D: UInt64
    skipped: str
    characters: int = 0

    @property
    def lengths_D(self) -> Int64:
        """Tokens in each document, without its end token."""
        return np.diff(self.offsets) - 1

    def split(self, document: int, tail: int) -> "TokenCache":
        """Return a view in which the last `tail` tokens of a document are one of their own."""
        cut = self.offsets[document + 1] - tail
        return dataclasses.replace(
            self,
            offsets=np.insert(self.offsets, document + 1, cut),
            hashes_D=np.insert(self.hashes_D, document + 1, self.hashes_D[document]),
        )


def fingerprint(source: Source, columns: Columns, max_documents: int | None) -> str:
    """Return a hash of the text that a source would give: its files' names, sizes and times."""
    listing: list[object] = [FORMAT, columns.text, max_documents]
    if columns.group is not None:
        listing.append(columns.group)
    if sources.is_hub(source):
        listing.append([source.location, source.revision])
    else:
        for name, path in sources.files(source):
            state = path.stat()
            listing.append([name, state.st_size, state.st_mtime_ns])
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def cache_path(
    source: Source,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    columns: Columns,
    max_documents: int | None,
    window: int | None = None,
) -> Path:
    """Return the place of a cache; window: of a source that is cached in parts, else None."""
    text_hash = fingerprint(source, columns, max_documents)
    names = f"{text_hash} {tokenizer.fingerprint()}" + ("" if window is None else f" {window}")
    return folder / f"tokens-{hashlib.sha256(names.encode()).hexdigest()[:24]}"


def open_cache(
    source: Source,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    columns: Columns,
    max_documents: int | None,
    report: Report,
) -> TokenCache:
    """Open the cache of `source` in `folder`; builds it if it is missing or damaged."""

    def read(skipped: Counter[str]) -> Iterator[Document]:
        return sources.read(source, columns=columns, max_documents=max_documents, skipped=skipped)

    place = cache_path(source, tokenizer, folder, columns=columns, max_documents=max_documents)
    return open_at(place, source, tokenizer, read, report)


def open_at(
    final: Path,
    source: Source,
    tokenizer: Tokenizer,
    read: Callable[[Counter[str]], Iterator[Document]],
    report: Report,
) -> TokenCache:
    """Open the cache at `final`; builds it of the documents that `read` gives if need be.

    read: counts what it skips by reason in its argument.
    """
    if (cache := _read(final)) is not None:
        return cache
    with building(final, report) as part:
        if (cache := _read(final, report)) is not None:
            return cache
        shutil.rmtree(final, ignore_errors=True)  # a damaged one
        part.mkdir()
        skipped: Counter[str] = Counter()
        _write(part, source, read(skipped), tokenizer, skipped, report)
    cache = _read(final)
    assert cache is not None
    return cache


def _read(folder: Path, report: Report = lambda line: None) -> TokenCache | None:
    """Open a finished cache; None if there is none, or if it is damaged, which is said.

    Its use is noted by the time of its manifest.
    """
    if not folder.is_dir():
        return None
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, (size, checksum) in manifest["files"].items():
            path = folder / name
            if path.stat().st_size != size or _checksum(path) != checksum:
                raise ValueError(f"{name} is not as it was written")
        cache = TokenCache(
            folder=folder,
            tokens=np.memmap(folder / "tokens.bin", dtype=manifest["dtype"], mode="r"),
            offsets=np.load(folder / "offsets.npy", allow_pickle=False),
            hashes_D=np.load(folder / "hashes.npy", allow_pickle=False),
            skipped=manifest["skipped"],
            characters=manifest["characters"],
        )
    except DAMAGED as error:
        report(f"The token cache {str(folder)!r} is damaged, and is built again: {error}")
        return None
    with suppress(OSError):  # another user's
        os.utime(folder / MANIFEST)
    return cache


def _checksum(path: Path) -> int:
    """Return the CRC-32 of a file, of one beyond `CHECKED` of its first and last bytes."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        total = zlib.crc32(str(size).encode())
        parts = [(0, size)] if size <= CHECKED else [(0, CHECKED // 2), (size - CHECKED // 2, size)]
        for start, end in parts:
            file.seek(start)
            while start < end:
                block = file.read(min(2**16, end - start))
                if not block:
                    break
                total = zlib.crc32(block, total)
                start += len(block)
    return total


def _write(
    folder: Path,
    source: Source,
    documents: Iterator[Document],
    tokenizer: Tokenizer,
    skipped: Counter[str],
    report: Report,
) -> None:
    """Tokenize all documents into the files of a cache."""
    dtype = np.uint16 if tokenizer.vocabulary_size <= 2**16 else np.uint32
    lengths, hashes = array("q"), array("Q")  # a list of numbers takes five times the memory
    total, characters, reported = 0, 0, time.monotonic()
    with (folder / "tokens.bin").open("wb") as file:
        for batch in _batches(documents):
            for tokens in tokenizer.encode_plain([document.text for document in batch]):
                file.write(np.append(tokens, tokenizer.end_id).astype(dtype).tobytes())
                lengths.append(len(tokens) + 1)
            hashes.extend(map(_identity, batch))
            characters += sum(len(document.text) for document in batch)
            total += sum(lengths[-len(batch) :])
            if time.monotonic() - reported > REPORT_SECONDS:
                reported = time.monotonic()
                report(f"Tokenizing {source.name}: {len(lengths):,} documents, {total:,} tokens")
    left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
    if not lengths:
        raise DataError(
            f"The data source {source.name!r} has no text in {source.location!r}"
            + (f"; skipped: {left_out}" if left_out else "")
            + ". Add text, or remove the source."
        )
    report(
        f"Tokenized {source.name}: {len(lengths):,} documents, {total:,} tokens"
        + (f"; skipped: {left_out}" if left_out else "")
    )
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    np.save(folder / "offsets.npy", offsets, allow_pickle=False)
    np.save(folder / "hashes.npy", np.frombuffer(hashes, dtype=np.uint64), allow_pickle=False)
    manifest = {
        "files": {
            path.name: (path.stat().st_size, _checksum(path)) for path in sorted(folder.iterdir())
        },
        "dtype": np.dtype(dtype).name,
        "skipped": left_out,
        "source": source.location,
        "tokens": total,
        "characters": characters,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Group documents into batches of limited number and size."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if len(batch) == _BATCH or size > 2**22:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _identity(document: Document) -> int:
    """Hash a document's group, or its text if it has none, for the held-out split."""
    identity = (document.group or document.text).encode("utf-8")
    return int.from_bytes(hashlib.blake2b(identity, digest_size=8).digest(), "little")
