"""Texts from a file, and what is said of each into another: `switchlm generate --input`."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from switchlm.errors import DataError


def read_texts(file: str) -> list[dict[str, Any]]:
    """Return one record a text, each with its "text": a line of a .txt, or a JSON line of others.

    A line of JSON is a text, or an object with a "text", whose other fields stay as they are.
    Raises DataError, which names the line, for one that cannot be read.
    """
    path = Path(file)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"The file {file!r} is not valid UTF-8: {error}") from None
    except OSError as error:
        raise DataError(f"Cannot read {file!r}: {error.strerror}.") from None
    if lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise DataError(f"The file {file!r} is empty: it should have one text a line.")
    records = []
    for number, line in enumerate(lines, 1):
        line = line.removesuffix("\r")
        record = {"text": line} if path.suffix == ".txt" else _parse(line, file, number)
        if not record["text"].strip():
            raise DataError(f"Line {number} of {file!r} has no text: there is nothing to generate.")
        records.append(record)
    return records


def _parse(line: str, file: str, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"Line {number} of {file!r} is not JSON: {error}") from None
    record = {"text": value} if isinstance(value, str) else value
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise DataError(
            f'Line {number} of {file!r} should be a JSON string, or an object with a "text", '
            f"got {line[:60]!r}."
        )
    try:
        record["text"].encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(
            f"Line {number} of {file!r} holds half of a surrogate pair, which is not Unicode."
        ) from None
    return record


def write_results(records: Iterable[dict[str, Any]], file: str | None) -> None:
    """Write one JSON line a record: to the file, whole or not at all, or to standard output."""
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    if file is None:
        typer.echo(lines, nl=False)
        return
    from switchlm.checkpoint.files import replace_file

    try:
        replace_file(Path(file), lines.encode())
    except OSError as error:
        raise DataError(
            f"Cannot write {file!r}: {error.strerror}. Name another --output."
        ) from None


def check_writable(file: str | None) -> None:
    """Raise DataError now, rather than after all the work, where the file has no folder."""
    if file is not None and (Path(file).is_dir() or not Path(file).parent.is_dir()):
        raise DataError(
            f"Cannot write {file!r}: it is a folder, or its folder does not exist. Make the folder "
            "first, or name another file."
        )


@contextmanager
def counting(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show on a terminal how many are done, and how long the rest will take; elsewhere the sum."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        number = bar.add_task(what, total=total)
        yield lambda done: bar.update(number, completed=done)
    typer.echo(f"{total:,} {what} done.", err=True)
