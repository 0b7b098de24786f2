"""Read one checkpoint folder: verified as a whole before a single tensor is touched.

Whether the stored parts of every tensor cover it exactly, no gap and nothing twice, follows from
shapes and offsets alone, before any number is read. Parts of an expert stack [E, ...] are named by
the numbers of the experts.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from switchlm.checkpoint import format, layout
from switchlm.checkpoint.collective import ALONE, Ranks
from switchlm.checkpoint.format import CODES, damaged, describe, join, readable, split
from switchlm.checkpoint.layout import Region, Stored, full_region, overlap, volume
from switchlm.errors import CheckpointError

STATE = "state.json"
SHOWN = 5  # problems that a message names
MOST_CELLS = 2**24  # that the parts of a tensor may cut it into; stops absurd allocations


def load_folder(
    folder: Path, into: Mapping[str, Any] | None = None, ranks: Ranks = ALONE
) -> dict[str, Any]:
    """Return the state in `folder`, which may be a copy of a checkpoint under any name.

    into: sections of the state (such as `model`) with tensors to fill in place, DTensors on any
        mesh among them, of which each rank reads its own part; these are the tensors of the state
        returned, all others are new, whole, and on the CPU. A section must have exactly the tensors
        of the checkpoint, in shape and dtype.

    Raises CheckpointError, on all ranks, for a damaged folder, for parts of tensors that are
    missing or stored twice, and for a section that does not fit, before anything is written into
    the tensors of `into`.
    """
    format.verify(folder, ranks)
    return read_verified(folder, into, ranks)


def read_verified(
    folder: Path, into: Mapping[str, Any] | None = None, ranks: Ranks = ALONE
) -> dict[str, Any]:
    """Return the state in a folder that `format.verify` has passed; see `load_folder`."""
    paths = sorted(folder.glob("*.safetensors"))[ranks.rank :: ranks.size]
    headers = ranks.on_all_ranks(lambda: _headers(folder, paths))
    state: dict[str, Any] = {}

    def prepare() -> None:
        with _explain(folder):
            state.update(_prepare(folder, headers, into or {}))

    def fill() -> None:
        with _explain(folder):
            layout.load(folder, state["values"], state["stored"])

    ranks.on_all_ranks(prepare)
    ranks.on_all_ranks(fill)
    joined: dict[str, Any] = state["joined"]
    return joined


def _headers(folder: Path, paths: list[Path]) -> list[tuple[str, Stored]]:
    with _explain(folder):
        return list(layout.index(paths))


def _prepare(
    folder: Path, headers: list[list[tuple[str, Stored]]], into: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the tensors to fill, where their parts are, and the state that they make up."""
    structure = json.loads((folder / STATE).read_bytes())
    described = {name: (dtype, shape) for name, dtype, shape in describe(structure)}
    stored: dict[str, list[Stored]] = {}
    for name, part in chain.from_iterable(headers):
        stored.setdefault(name, []).append(part)
    _bound(folder, described)
    check_parts(f"The checkpoint {str(folder)!r} is damaged: it", described, stored)
    given, _ = split(into)
    for section in into:
        _match(folder, section, described, given)
    values = {
        name: given[name] if name in given else torch.empty(shape, dtype=dtype)
        for name, (dtype, shape) in described.items()
    }
    joined = join(structure, values)
    if not isinstance(joined, dict):
        raise TypeError(f"it holds a {type(joined).__name__} instead of named sections")
    return {"values": values, "stored": stored, "joined": joined}


@contextmanager
def _explain(folder: Path) -> Iterator[None]:
    """Turn what damaged files do to a reader into the project's own error."""
    try:
        with readable(folder):
            yield
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise damaged(folder, f"{STATE} cannot be read ({error})") from error


def _match(
    folder: Path,
    section: str,
    stored: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    given: Mapping[str, Tensor],
) -> None:
    saved = {name for name in stored if name.split("/")[0] == section}
    wanted = {name for name in given if name.split("/")[0] == section}
    problems = [f"{name} is missing" for name in sorted(wanted - saved)]
    problems += [f"{name} is not wanted" for name in sorted(saved - wanted)]
    for name in sorted(wanted & saved):
        kind = (given[name].dtype, tuple(given[name].shape))
        if kind != stored[name]:
            problems.append(f"{name} is {_kind(*stored[name])}, not {_kind(*kind)}")
    if problems:
        more = f", and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise CheckpointError(
            f"The checkpoint {str(folder)!r} does not fit: in it {', '.join(problems[:SHOWN])}"
            f"{more}. Load it with the configuration that it was saved with."
        )


def _bound(folder: Path, stored: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    # Nothing is allocated that the files cannot hold, whatever the structure claims.
    held = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    claimed = sum(math.prod(shape) * dtype.itemsize for dtype, shape in stored.values())
    if claimed > held or any(size < 0 for _, shape in stored.values() for size in shape):
        raise damaged(folder, f"{STATE} claims {claimed} bytes of tensors, its files hold {held}")


def _kind(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def check_parts(
    where: str,
    described: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    stored: Mapping[str, list[Stored]],
) -> None:
    """Raise CheckpointError unless the stored parts tile every tensor, in its dtype.

    where: what holds them, for the message, such as `The checkpoint 'run/checkpoints/step-1'`.
    described: dtype and shape by name.
    """
    problems = [
        f"{name} is stored, but is no part of it" for name in stored if name not in described
    ]
    for name, (_, shape) in described.items():
        boxes = tuple(sorted(part.box for part in stored.get(name, ()) if volume(part.box)))
        problems += _problems(name, shape, boxes)
        if len(problems) > SHOWN:
            break
    if problems:
        more = ", and more" if len(problems) > SHOWN else ""
        raise CheckpointError(
            f"{where} does not hold every tensor exactly once: {'; '.join(problems[:SHOWN])}{more}."
        )
    for name, (dtype, _) in described.items():
        for part in stored.get(name, ()):
            if part.code != CODES[dtype]:
                raise CheckpointError(f"{where} holds {name} as {part.code}, not as {dtype}.")


def _problems(name: str, shape: tuple[int, ...], boxes: tuple[Region, ...]) -> list[str]:
    everything = full_region(shape)
    for box in boxes:
        inside = len(box) == len(shape) and overlap(box, everything) == box
        if not inside:
            return [f"a part of {name} lies outside its shape {list(shape)}"]
    if volume(everything) == 0 or boxes == (everything,):
        return []
    if not boxes:
        return [f"{name} is missing"]
    bands = _bands(shape, boxes)
    missing = [(start, stop, most == 0) for start, stop, fewest, most in bands if fewest == 0]
    doubled = [(start, stop, fewest > 1) for start, stop, fewest, most in bands if most > 1]
    return [
        f"{_say(name, shape, bad)} {what}"
        for bad, what in ((missing, "missing"), (doubled, "stored twice"))
        if bad
    ]


def _say(name: str, shape: tuple[int, ...], bad: list[tuple[int, int, bool]]) -> str:
    """Name the ranges (start, stop, whether all of it) of the first dim: `expert 3 of w is`."""
    if not shape:
        return f"{name} is"
    unit = "expert" if ".experts." in name else "row"
    ranges = [
        str(start) if stop == start + 1 else f"{start} to {stop - 1}" for start, stop, _ in bad
    ]
    many = len(bad) > 1 or bad[0][1] > bad[0][0] + 1
    shown = ", ".join(ranges[:SHOWN]) + " and more" * (len(ranges) > SHOWN)
    units = f"{unit}{'s' * many} {shown} of {name}"
    if not all(entire for _, _, entire in bad):
        return f"a part of {units} is"
    return f"{units} {'are' if many else 'is'}"


@lru_cache(maxsize=64)
def _bands(shape: tuple[int, ...], boxes: tuple[Region, ...]) -> list[tuple[int, int, int, int]]:
    """Return how often boxes cover each range of the first dim: (start, stop, fewest, most).

    Counted over the cells that all cuts make together. Many tensors of a model are cut alike, hence
    the cache.
    """
    cuts = [
        np.unique([0, size, *(side for box in boxes for side in box[dim])])
        for dim, size in enumerate(shape)
    ]
    cells = [len(cut) - 1 for cut in cuts]
    if math.prod(cells) > MOST_CELLS:
        raise CheckpointError(
            f"The {len(boxes)} parts of a tensor {list(shape)} do not fit together: the "
            "checkpoint is damaged."
        )
    counts = np.zeros(cells, dtype=np.int64)
    for box in boxes:
        sides = zip(cuts, box, strict=True)
        counts[tuple(slice(*cut.searchsorted(side)) for cut, side in sides)] += 1
    bounds = cuts[0] if shape else np.array([0, 1])
    counts = counts.reshape(len(bounds) - 1, -1)
    columns = bounds[:-1], bounds[1:], counts.min(1), counts.max(1)
    return list(zip(*(column.tolist() for column in columns), strict=True))
