"""The manifest of a checkpoint: the size and SHA-256 of every file, and of the manifest itself.

It is written last. A folder without one was never finished; one whose files differ from it was
damaged later. Its own bytes are canonical, so that no bit of them can change unseen. A manifest
finds accidents; it is no signature, and reading a checkpoint is safe without it.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from switchlm.checkpoint.files import sync_file
from switchlm.checkpoint.ranks import ALONE, Ranks
from switchlm.errors import CheckpointError

NAME = "manifest.json"
FORMAT = 1
LARGEST = 2**24  # bytes; a manifest has about a hundred a file


def write(folder: Path, step: int, known: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Describe all files of `folder` as they are now, as the checkpoint of `step`.

    known: size and SHA-256 of files that need not be read again for them.
    """
    known = known or {}
    files = {
        path.name: known.get(path.name) or _describe(path) for path in sorted(folder.iterdir())
    }
    path = folder / NAME
    path.write_bytes(_encode({"format": FORMAT, "step": step, "files": files}))
    sync_file(path)


def verify(folder: Path, ranks: Ranks = ALONE) -> int:
    """Read every file of a checkpoint, compare it with the manifest, and return the step.

    Ranks share the reading. Raises CheckpointError on all of them that names the first file which
    is missing, not listed, or differs.
    """
    content = ranks.first(lambda: _listed(folder))
    files = content["files"]
    by_size = sorted(files, key=lambda name: (-files[name]["size"], name))
    share = by_size[ranks.rank :: ranks.size]
    ranks.each(lambda: _compare_content(folder, {name: files[name] for name in share}))
    step: int = content["step"]
    return step


def _listed(folder: Path) -> dict[str, Any]:
    """Return the manifest, whose files are all there in their sizes, and no others."""
    with _readable(folder):
        content = _read(folder)
        _compare_names(folder, content["files"])
        return content


def _compare_content(folder: Path, files: dict[str, Any]) -> None:
    with _readable(folder):
        for name, expected in files.items():
            if _describe(folder / name) != expected:
                raise _damaged(folder, f"{name} does not have the SHA-256 of the manifest")


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"Cannot read the checkpoint {str(folder)!r}: {error}.") from error


def _read(folder: Path) -> dict[str, Any]:
    path = folder / NAME
    if not folder.is_dir():
        raise CheckpointError(f"There is no checkpoint folder {str(folder)!r}.")
    if not path.is_file():
        raise _damaged(folder, f"{NAME} is missing")
    with path.open("rb") as stream:
        found = stream.read(LARGEST)
    try:
        content = json.loads(found)
        version, intact = content["format"], found == _encode(content)
    except (ValueError, LookupError, TypeError, RecursionError):
        raise _damaged(folder, f"{NAME} cannot be read") from None
    if not intact:
        raise _damaged(folder, f"{NAME} has been changed")
    if version != FORMAT:
        raise CheckpointError(
            f"The checkpoint {str(folder)!r} has format {version!r}; this version of switchlm "
            f"reads format {FORMAT}. Load it with the version that wrote it."
        )
    if not isinstance(content.get("step"), int) or not isinstance(content.get("files"), dict):
        raise _damaged(folder, f"{NAME} lacks its step or its files")
    return content


def _compare_names(folder: Path, files: dict[str, Any]) -> None:
    present = {path.name: path for path in folder.iterdir() if path.name != NAME}
    for name, path in present.items():
        if path.is_symlink() or (name not in files and name.endswith(".safetensors")):
            raise _damaged(folder, f"{name} does not belong to it")
    for name, expected in files.items():
        if name not in present or not present[name].is_file():
            raise _damaged(folder, f"{name} is missing")
        size = present[name].stat().st_size
        if not isinstance(expected, dict) or size != expected.get("size"):
            raise _damaged(folder, f"{name} has {size} bytes, not those of the manifest")


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return {"size": stream.tell(), "sha256": digest}


def _encode(content: dict[str, Any]) -> bytes:
    body = {key: value for key, value in content.items() if key != "sha256"}
    canonical = json.dumps(body, sort_keys=True).encode()
    body["sha256"] = hashlib.sha256(canonical).hexdigest()
    return json.dumps(body, indent=1, sort_keys=True).encode() + b"\n"


def _damaged(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(f"The checkpoint {str(folder)!r} is damaged: {what}.")
