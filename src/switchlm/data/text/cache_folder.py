"""The folder of cached text: what is in it, how large it is, and what is deleted from it.

It has token caches (folders `tokens-KEY`, see token_cache.py), trained tokenizers
(`tokenizer-KEY.json`) and compiled kernels (`native`). All of them are made again when needed.
"""

import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from switchlm.config import parse_size
from switchlm.data.config import DataConfig
from switchlm.data.text.token_cache import DAMAGED, MANIFEST
from switchlm.files import Report


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A file or folder of the cache.

    what: the source of tokens, or the kind of entry.
    readable: False for tokens that are unfinished, damaged or of an earlier version.
    tokens: of a token cache, else None.
    size: bytes.
    used: when it was opened last, in seconds since 1970.
    """

    path: Path
    what: str
    readable: bool
    tokens: int | None
    size: int
    used: float


def cache_folder(config: DataConfig) -> Path:
    """Return the folder of a configuration."""
    return default_folder() if config.cache is None else Path(config.cache).expanduser()


def default_folder() -> Path:
    """Return the folder that is used unless another one is given."""
    return Path.home() / ".cache" / "switchlm"


def entries(folder: Path) -> list[Entry]:
    """Return what is in the folder, the most recently used first; nothing if it is missing."""
    paths = [path for pattern in ("tokens-*", "tokenizer-*.json") for path in folder.glob(pattern)]
    found = [_entry(path) for path in paths if not path.name.endswith(".lock")]
    if (native := folder / "native").is_dir():
        found.append(_entry(native))
    return sorted(found, key=lambda entry: -entry.used)


def _entry(path: Path) -> Entry:
    what, readable, tokens = "compiled kernels", True, None
    used = path.stat().st_mtime
    if path.name.startswith("tokenizer-"):
        what = "tokenizer"
    elif path.name.startswith("tokens-"):
        what, readable = "tokens, unfinished, damaged or of an earlier version", False
        with suppress(*DAMAGED):
            used = (path / MANIFEST).stat().st_mtime
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            sizes = {name: size for name, (size, _) in manifest["files"].items()}
            if all((path / name).stat().st_size == size for name, size in sizes.items()):
                what, readable, tokens = str(manifest["source"]), True, int(manifest["tokens"])
    inside = [path, *path.rglob("*")] if path.is_dir() else [path]
    size = sum(one.stat().st_size for one in inside if one.is_file())
    return Entry(path=path, what=what, readable=readable, tokens=tokens, size=size, used=used)


def trim(folder: Path, limit: int, keep: Sequence[Path] = ()) -> list[Entry]:
    """Delete the entries used longest ago until all together have at most `limit` bytes.

    keep: entries that stay. Programs that read a deleted one go on, since they have it open.

    Returns the deleted ones.
    """
    found = entries(folder)
    total, deleted = sum(entry.size for entry in found), []
    for entry in reversed(found):
        if entry.size and total <= limit:  # empty ones count nothing, and go with the others
            break
        if entry.path not in keep:
            _delete(entry.path)
            total -= entry.size
            deleted.append(entry)
    return deleted


def keep_limit(config: DataConfig, keep: Sequence[Path], report: Report) -> None:
    """Trim the folder to `data.cache_limit`, if there is one, and say what was deleted."""
    if config.cache_limit is None:
        return
    folder, limit = cache_folder(config), parse_size(config.cache_limit, "data.cache_limit")
    for entry in trim(folder, limit, keep):
        report(f"Deleted the cache of {entry.what!r}, {entry.size / 1e9:.2f} GB, to stay in limits")
    size = sum(entry.size for entry in entries(folder))
    if size > limit:
        report(
            f"Warning: the cached text of this run has {size / 1e9:.2f} GB, more than "
            f"data.cache_limit {config.cache_limit}"
        )


def _delete(path: Path) -> None:
    """Delete an entry; a token cache without its manifest counts as missing from the start."""
    if path.is_dir():
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
    path.with_name(path.name + ".lock").unlink(missing_ok=True)
