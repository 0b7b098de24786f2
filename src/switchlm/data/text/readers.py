"""Read documents from plain text, JSON, CSV and Parquet files.

Invalid documents are skipped and counted by reason; an invalid file, such as one without the text
column, is a DataError.
"""

import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

from switchlm.data.config import Columns
from switchlm.errors import DataError, require

WHOLE = 2**20  # bytes; a text file up to this size is one document
SECTION = 2**16  # bytes; larger ones are read as sections of about this size, cut at line ends
LONGEST_LINE = 2**26  # bytes of a JSON record; bounds the memory that a compressed file can take
LARGEST_LIST = 2**30  # bytes of a JSON file that is one list, which is parsed whole


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text and its group: documents of one group are all held out, or all trained on.

    With an empty group, that holds for documents with equal texts.
    """

    text: str
    group: str = ""


def read_file(
    path: Path, columns: Columns, *, alone: bool, skipped: Counter[str]
) -> Iterator[Document]:
    """Yield the documents of one file; the suffix of its name gives the format.

    alone: the source is this file only, so that its sections are documents however small it is.
    """
    kinds = path.name.lower().split(".")[1:]
    kind = kinds[-2:-1] if kinds[-1:] in (["gz"], ["zst"]) else kinds[-1:]
    try:
        if kinds[-1:] == ["parquet"]:
            yield from read_records(read_parquet(path, columns), path.name, columns, skipped)
            return
        if kind == ["json"]:
            with open_stream(path, kinds) as stream:
                records = _json_records(stream, path.name, skipped)
                if records is not None:
                    yield from read_records(records, path.name, columns, skipped)
                    return
        with open_stream(path, kinds) as stream:
            if kind in (["jsonl"], ["ndjson"]):
                yield from read_records(_json_lines(stream, skipped), path.name, columns, skipped)
            elif kind in (["csv"], ["tsv"]):
                rows = read_csv(stream, "\t" if kind == ["tsv"] else ",")
                yield from read_records(rows, path.name, columns, skipped)
            else:
                yield from _plain(stream, alone, skipped)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"Cannot read {str(path)!r}: {error}") from None


@contextmanager
def open_stream(path: Path, kinds: list[str]) -> Iterator[BinaryIO]:
    """Open a file for reading, decompressed if its name ends in `.gz` or `.zst`."""
    if kinds[-1:] == ["zst"]:
        zstandard = require("zstandard", "data", f"Reading {path.name}")
        try:
            with zstandard.open(path, "rb") as stream:
                yield cast(BinaryIO, io.BufferedReader(stream))
        except zstandard.ZstdError as error:
            raise DataError(f"Cannot decompress {str(path)!r}: {error}") from None
    elif kinds[-1:] == ["gz"]:
        with gzip.open(path, "rb") as stream:
            yield cast(BinaryIO, stream)
    else:
        with path.open("rb") as stream:
            yield stream


def _plain(stream: BinaryIO, alone: bool, skipped: Counter[str]) -> Iterator[Document]:
    """Yield a file as one document, or as sections if it is large or the only one of its source.

    Sections are documents of their own, so that the held-out share is kept where files are few.
    """
    whole = 0 if alone else WHOLE
    head = stream.read(whole + 1) if whole else b""
    if whole and len(head) <= whole:
        text = _decode(head, skipped)
        if text is not None:
            yield Document(text=text)
        return
    carried = head
    while section := carried + stream.read(SECTION):
        section += stream.readline(SECTION)
        # If there is no line end in this range, the cut may be inside a character.
        complete = len(section) - _unfinished(section)
        section, carried = section[:complete], section[complete:]
        if not section:  # the file ends inside a character
            section, carried = carried, b""
        text = _decode(section, skipped)
        if text is not None:
            yield Document(text=text)


def _unfinished(raw: bytes) -> int:
    """Return the number of bytes of an incomplete UTF-8 character at the end."""
    for back in range(1, min(3, len(raw)) + 1):
        byte = raw[-back]
        if byte >= 0xC0:
            needed = 2 + (byte >= 0xE0) + (byte >= 0xF0)
            return back if back < needed else 0
        if byte < 0x80:
            break
    return 0


def _decode(raw: bytes, skipped: Counter[str]) -> str | None:
    if b"\0" in raw:
        skipped["binary"] += 1
        return None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        skipped["not UTF-8"] += 1
        return None


def _json_lines(stream: BinaryIO, skipped: Counter[str]) -> Iterator[Any]:
    while line := stream.readline(LONGEST_LINE):
        if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
            skipped[f"longer than {LONGEST_LINE >> 20} MiB"] += 1
            while line and not line.endswith(b"\n"):
                line = stream.readline(LONGEST_LINE)
            continue
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except UnicodeDecodeError:
            skipped["not UTF-8"] += 1
        except (ValueError, RecursionError):
            skipped["not JSON"] += 1


def _json_records(stream: BinaryIO, where: str, skipped: Counter[str]) -> Iterable[Any] | None:
    """Return the records of a JSON file, a list of objects or an object per line.

    None for any other JSON, which is read as plain text.
    """
    first = stream.readline(LONGEST_LINE)
    if first.lstrip().startswith(b"["):
        text = first + stream.read(LARGEST_LIST)
        if len(text) >= LARGEST_LIST:
            raise DataError(
                f"{where} is a list of more than {LARGEST_LIST >> 30} GiB, which would be parsed "
                "whole: write it as JSON lines (.jsonl), an object per line."
            )
        try:
            records = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is not valid JSON: {error}") from None
        return records if all(isinstance(record, dict) for record in records) else None
    try:
        record = json.loads(first)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    return chain([record], _json_lines(stream, skipped))


def read_csv(stream: BinaryIO, separator: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a CSV file whose first row names the columns, with cells of any size.

    Bytes that are not UTF-8 become surrogates, by which the row is known as invalid.
    """
    csv.field_size_limit(2**31 - 1)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    yield from csv.DictReader(text, delimiter=separator)


def read_records(
    records: Iterable[Any], where: str, columns: Columns, skipped: Counter[str]
) -> Iterator[Document]:
    """Yield the texts of records; those without text or group are skipped and counted.

    Raises DataError if the first record lacks a column.
    """
    for number, record in enumerate(records):
        if number == 0 and isinstance(record, dict):
            _check_columns(where, columns, list(record))
        text = record.get(columns.text) if isinstance(record, dict) else None
        if not isinstance(text, str):
            skipped[f"without text in {columns.text!r}"] += 1
            continue
        group = "" if columns.group is None else record.get(columns.group)
        if group is None:
            skipped[f"without a group in {columns.group!r}"] += 1
            continue
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # JSON may contain half of a surrogate pair
            skipped["not UTF-8"] += 1
            continue
        yield Document(text=text, group=str(group))


def _check_columns(where: str, columns: Columns, present: list[str]) -> list[str]:
    """Return the columns to read, all of which must be present."""
    needed = {"text": columns.text} | ({"group": columns.group} if columns.group else {})
    holds = {"text": "holds the text", "group": "says which document a record belongs to"}
    for kind, column in needed.items():
        if column not in present:
            raise DataError(
                f"{where} has no column {column!r}; it has: {', '.join(map(str, present))}. "
                f"Name the one that {holds[kind]} with data.{kind}_column."
            )
    return list(needed.values())


def read_parquet(path: Path, columns: Columns | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file, with all its columns, or `columns` only."""
    parquet = require("pyarrow.parquet", "data", f"Reading {path.name}")
    pyarrow = require("pyarrow", "data", f"Reading {path.name}")
    try:
        table = parquet.ParquetFile(path)
        present = table.schema_arrow.names
        wanted = None if columns is None else _check_columns(path.name, columns, present)
        for rows in table.iter_batches(batch_size=256, columns=wanted):
            yield from rows.to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"Cannot read the Parquet file {str(path)!r}: {error}") from None
