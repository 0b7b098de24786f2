"""Where text comes from: files, folders, globs, hub datasets and Python's own sources.

A source is written `[name=]location[:weight]`, such as `en=texts/en:0.7` or `python:stdlib`.
`each:location` makes every file or folder in a folder or glob a source of its own.
"""

import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from glob import glob, has_magic
from itertools import chain
from pathlib import Path

from switchlm.data.config import Columns
from switchlm.data.text.hub import find_revision, read_hub
from switchlm.data.text.readers import Document, read_file
from switchlm.errors import DataError
from switchlm.files import Report

_NAME = re.compile(r"([A-Za-z0-9][\w.-]*)=(.+)", re.DOTALL)
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_TEXT_SUFFIXES = re.compile(r"(\.(txt|jsonl|ndjson|parquet|gz|zst))*$")
MAX_KINDS = 4  # of files that are named
_SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "dist-packages", "node_modules"})


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source; `weight` is None if the user gave none, `revision` is of datasets of the hub."""

    name: str
    location: str
    weight: float | None = None
    revision: str | None = None


def parse(text: str) -> Source:
    """Parse `[name=]location[:weight]`; a path that exists may contain `=` and `:`."""
    match = _NAME.fullmatch(text)
    name, location = (match[1], match[2]) if match and not os.path.exists(text) else ("", text)
    weight = None
    head, colon, tail = location.rpartition(":")
    if colon and _NUMBER.fullmatch(tail) and not os.path.exists(location):
        location, weight = head, float(tail)
        if not 0 < weight < float("inf"):
            raise DataError(f"The weight of the data source {text!r} must be positive.")
    if not location.strip():
        raise DataError(
            f"Cannot read the data source {text!r}: write it as path, path:weight or "
            "name=path:weight, such as en=texts/en:0.7."
        )
    return Source(name=name or _default_name(location), location=location, weight=weight)


def parse_all(texts: Sequence[str]) -> tuple[Source, ...]:
    """Parse all sources; of equal names, later ones get a number."""
    if not texts:
        raise DataError(
            "There are no data sources. Give at least one, such as --data python:stdlib or "
            "--data path/to/texts."
        )
    sources: list[Source] = []
    for source in (one for text in texts for one in _expand(parse(text))):
        taken = {other.name for other in sources}
        name, number = source.name, 2
        while name in taken:
            name, number = f"{source.name}-{number}", number + 1
        sources.append(replace(source, name=name))
    return tuple(sources)


def _expand(source: Source) -> list[Source]:
    """Return the sources of `each:`, or else the source itself.

    A source is named by the words that the wildcards matched: `each:news.*.txt` gives
    `news.afr.txt` the name `afr`.
    """
    if not source.location.startswith("each:"):
        return [source]
    pattern = source.location.removeprefix("each:")
    if os.path.isdir(pattern):
        paths = [os.path.join(pattern, name) for name in os.listdir(pattern)]
    else:
        paths = glob(pattern, recursive=True)
    prefix = "" if source.name == source.location else f"{source.name}-"
    found = [
        replace(source, name=prefix + _matched(pattern, path), location=path)
        for path in sorted(paths)
        if not Path(path).name.startswith(".")
    ]
    if not found:
        raise DataError(
            f"There are no files for {source.location!r}: give a folder or a glob, as in "
            "each:texts or 'each:texts/*.jsonl'."
        )
    return found


def _matched(pattern: str, path: str) -> str:
    """Return the part of a path that the wildcards matched, extended to full words."""
    name = Path(path).name
    if has_magic(pattern) and not os.path.isdir(pattern):
        before, *_, after = re.split(r"[*?\[\]]", pattern)
        start = len(re.sub(r"[^\W_]*$", "", before))
        name = path[start : len(path) - len(re.sub(r"^[^\W_]*", "", after))]
    return _TEXT_SUFFIXES.sub("", name)


def _default_name(location: str) -> str:
    if location.startswith("each:"):
        return location
    if location.startswith(("python:", "hub:")):
        return location.split(":")[1].rpartition("/")[2]
    path = Path(location)
    while has_magic(path.name):
        path = path.parent
    return path.name.split(".")[0] or path.resolve().name or location


def is_hub(source: Source) -> bool:
    """Return whether the source is a dataset on the hub, without local files."""
    return source.location.startswith("hub:")


def with_revisions(parsed: Sequence[Source], folder: Path, report: Report) -> tuple[Source, ...]:
    """Return the sources, those of the hub with their revision; folder: of the caches."""
    return tuple(
        replace(one, revision=find_revision(one.location, folder, report)) if is_hub(one) else one
        for one in parsed
    )


def files(source: Source) -> list[tuple[str, Path]]:
    """Return (name relative to the source's root, path) of every file, sorted.

    Skips hidden files and folders, and caches and installed packages inside a library.
    """
    location = source.location
    if location.startswith("python:"):
        root = _python_folder(location)
        found = [path for path in _walk(root) if path.suffix == ".py"]
    elif os.path.isfile(location):
        root = Path(location).parent
        found = [Path(location)]
    elif os.path.isdir(location):
        root = Path(location)
        found = _walk(root)
    elif has_magic(location):
        root = Path()
        found = [
            file
            for path in map(Path, glob(location, recursive=True))
            for file in (_walk(path) if path.is_dir() else [path])
        ]
    else:
        raise DataError(
            f"There is no file, folder or glob {location!r} for the data source {source.name!r}. "
            "A weight is a number after the last colon, as in en=texts/en:0.7."
        )
    names = {os.path.relpath(path, root): path for path in found if path.is_file()}
    if not names:
        raise DataError(f"The data source {source.name!r} has no files: {location!r} is empty.")
    return sorted(names.items())


def describe(source: Source) -> str:
    """Return what is read: the files by the suffixes of their names, the most frequent first."""
    if is_hub(source):
        return source.location
    names = [name for name, _ in files(source)]
    if len(names) == 1:
        return Path(names[0]).name
    kinds = Counter("".join(Path(name).suffixes[-2:]) or "without suffix" for name in names)
    most = [f"{count:,} {kind}" for kind, count in kinds.most_common(MAX_KINDS)]
    rest = len(names) - sum(count for _, count in kinds.most_common(MAX_KINDS))
    return f"{len(names):,} files, {', '.join(most + [f'{rest:,} others'] * (rest > 0))}"


def _python_folder(location: str) -> Path:
    folders = {"python:stdlib": "stdlib", "python:site-packages": "purelib"}
    if location not in folders:
        raise DataError(
            f"There is no data source {location!r}; use python:stdlib or python:site-packages."
        )
    return Path(sysconfig.get_paths()[folders[location]])


def _walk(root: Path) -> list[Path]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(
            name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith(".")
        )
        found += [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
    return found


def read(
    source: Source, *, columns: Columns, max_documents: int | None, skipped: Counter[str]
) -> Iterator[Document]:
    """Yield the documents of a source in a fixed order; counts skipped ones, by reason."""
    if is_hub(source):
        documents: Iterator[Document] = read_hub(source.location, source.revision, columns, skipped)
    else:
        found = files(source)
        alone = len(found) == 1
        documents = chain.from_iterable(
            read_file(path, columns, alone=alone, skipped=skipped) for _, path in found
        )
    count = 0
    for document in documents:
        if not document.text.strip():
            skipped["empty"] += 1
            continue
        yield document
        count += 1
        if count == max_documents:
            return
