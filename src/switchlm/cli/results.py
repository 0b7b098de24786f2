"""Files of results: one JSON object per line, written at the end, and only over earlier results."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from switchlm.errors import DataError
from switchlm.files import new_file, to_json


def check_output(path: Path, key: str, option: str) -> None:
    """Raise DataError, before any work, for a file that cannot be written or is not ours.

    key: of every record that the command writes.
    option: by which the file was named.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise DataError(
            f"Cannot write {str(path)!r}: it is a folder, or its folder does not exist. Make the "
            f"folder first, or name another file with {option}."
        )
    if not path.is_file() or not path.stat().st_size:  # missing, or a device
        return
    try:
        with path.open(encoding="utf-8") as file:
            ours = key in json.loads(file.readline())
    except (OSError, ValueError, TypeError, RecursionError):
        ours = False
    if not ours:
        raise DataError(
            f"Will not replace {str(path)!r}: it holds no results of this command. Name another "
            f"file with {option}, or delete that one."
        )


@contextmanager
def json_lines(
    path: Path | None, key: str, option: str
) -> Iterator[Callable[[dict[str, Any]], object]]:
    """Yield a function that writes a record as a line of JSON; the file appears at the end.

    path: None writes nothing.
    key, option: see `check_output`.
    """
    if path is None:
        yield lambda record: None
        return
    check_output(path, key, option)
    try:
        with new_file(path) as file:
            yield lambda record: file.write((to_json(record, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise DataError(
            f"Cannot write {str(path)!r}: {error.strerror}. Name another file with {option}."
        ) from None
