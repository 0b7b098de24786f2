"""switchlm cache: look at the folder of cached text, and clear it."""

import dataclasses
import time
from typing import Annotated

import typer
from rich.console import Console

from switchlm.cli import options
from switchlm.cli.progress import plain_table
from switchlm.config import parse_size
from switchlm.errors import ConfigError
from switchlm.files import to_json


def cache(
    cache: options.Cache = None,
    keep: Annotated[
        str | None,
        typer.Option(help="Delete what was used longest ago until this much is left: 20GB."),
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Delete everything.")] = False,
    as_json: options.Json = False,
) -> None:
    """Show the cached texts, tokenizers and kernels, and delete them.

    They are made again when they are needed.
    """
    from switchlm.data.text.cache_folder import default_folder, entries, trim

    if clear and keep is not None:
        raise ConfigError(f"--clear deletes everything and --keep {keep} does not: give one.")
    folder = default_folder() if cache is None else cache.expanduser()
    deleted = []
    if clear or keep is not None:
        deleted = trim(folder, 0 if keep is None else parse_size(keep, "--keep"))
    found = entries(folder)
    total = sum(entry.size for entry in found)
    if as_json:
        listed = [{**dataclasses.asdict(entry), "path": str(entry.path)} for entry in found]
        result = {"folder": str(folder), "bytes": total, "entries": listed}
        typer.echo(to_json(result | {"deleted": [str(entry.path) for entry in deleted]}))
        return
    console = Console()
    table = plain_table(["text", "used"], ["tokens", "MB"])
    whole = [entry for entry in found if entry.readable]
    for entry in whole:
        used = time.strftime("%Y-%m-%d", time.localtime(entry.used))
        tokens = "" if entry.tokens is None else f"{entry.tokens:,}"
        table.add_row(entry.what, used, tokens, f"{entry.size / 1e6:,.1f}")
    if whole:
        console.print(table)
    if number := len(found) - len(whole):
        size = sum(entry.size for entry in found if not entry.readable)
        console.print(
            f"Token caches that are unfinished, damaged or of an earlier version: {number:,}, "
            f"{size / 1e6:,.1f} MB.",
            highlight=False,
            soft_wrap=True,
        )
    freed = sum(entry.size for entry in deleted)
    if deleted:
        console.print(f"Deleted {len(deleted)} of them, {freed / 1e6:,.1f} MB.", highlight=False)
    console.print(f"{folder}: {total / 1e6:,.1f} MB.", highlight=False, soft_wrap=True)
