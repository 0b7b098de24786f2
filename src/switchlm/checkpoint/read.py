"""Read one checkpoint folder: verified as a whole before a single tensor is touched.

Whether the stored parts of every tensor cover it exactly, no gap and nothing twice, follows from
shapes and offsets alone, before any number is read. Parts of an expert stack [E, ...] are named by
the numbers of the experts.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from switchlm.checkpoint import format, tensors
from switchlm.checkpoint.collective import ALONE, Ranks
from switchlm.checkpoint.format import describe, join, split
from switchlm.checkpoint.layout import Region, full_region, overlap, volume
from switchlm.errors import CheckpointError

STATE = "state.json"


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
    """Return the state in a folder that `manifest.verify` has passed; see `load_folder`."""
    paths = sorted(folder.glob("*.safetensors"))[ranks.rank :: ranks.size]
    headers = ranks.on_all_ranks(lambda: _headers(folder, paths))
    state: dict[str, Any] = {}

    def prepare() -> None:
        with _explain(folder):
            state.update(_prepare(folder, headers, into or {}))

    def fill() -> None:
        with _explain(folder):
            tensors.load(folder, state["values"], state["stored"])

    ranks.on_all_ranks(prepare)
    ranks.on_all_ranks(fill)
    joined: dict[str, Any] = state["joined"]
    return joined


def _headers(folder: Path, paths: list[Path]) -> list[list[Any]]:
    with _explain(folder):
        return [
            [name, stored.box, stored.code, stored.file] for name, stored in tensors.index(paths)
        ]


def _prepare(
    folder: Path, headers: list[list[list[Any]]], into: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the tensors to fill, where their parts are, and the state that they make up."""
    structure = json.loads((folder / STATE).read_bytes())
    described = {name: (dtype, shape) for name, dtype, shape in describe(structure)}
    stored: dict[str, list[tensors.Stored]] = {}
    for name, box, code, file in (part for parts in headers for part in parts):
        sides = tuple((int(start), int(stop)) for start, stop in box)
        stored.setdefault(name, []).append(tensors.Stored(sides, code, file))
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


def check_parts(
    where: str,
    described: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    stored: Mapping[str, list[tensors.Stored]],
) -> None:
    """Raise CheckpointError unless the stored parts make up every tensor, in its dtype.

    where: what holds them, for the message; described: dtype and shape by name.
    """
    shapes = {name: shape for name, (_, shape) in described.items()}
    check(shapes, {name: [p.box for p in parts] for name, parts in stored.items()}, where)
    for name, (dtype, _) in described.items():
        for part in stored.get(name, ()):
            if part.code != tensors.CODES[dtype]:
                raise CheckpointError(f"{where} holds {name} as {part.code}, not as {dtype}.")


@contextmanager
def _explain(folder: Path) -> Iterator[None]:
    """Turn what damaged files do to a reader into the project's own error."""
    try:
        yield
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"The checkpoint {str(folder)!r} is damaged: {STATE} cannot be read ({error})."
        ) from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"Cannot read the checkpoint {str(folder)!r}: {error}.") from error


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
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"The checkpoint {str(folder)!r} does not fit: in it {', '.join(problems[:5])}{more}. "
            "Load it with the configuration that it was saved with."
        )


def _bound(folder: Path, stored: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    # Nothing is allocated that the files cannot hold, whatever the structure claims.
    held = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    claimed = sum(math.prod(shape) * dtype.itemsize for dtype, shape in stored.values())
    if claimed > held or any(size < 0 for _, shape in stored.values() for size in shape):
        raise CheckpointError(
            f"The checkpoint {str(folder)!r} is damaged: {STATE} claims {claimed} bytes of "
            f"tensors, its files hold {held}."
        )


def _kind(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


SHOWN = 5

# How often the parts cover each index range of the first dim: (start, stop, fewest, most).
Bands = tuple[tuple[int, int, int, int], ...]


def check(
    shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, Iterable[Region]], where: str
) -> None:
    """Raise CheckpointError unless the boxes of each name tile its shape.

    where: what holds them, for the message, such as `The checkpoint 'run/checkpoints/step-1'`.
    """
    problems = [f"{name} is stored, but is no part of it" for name in stored if name not in shapes]
    for name, shape in shapes.items():
        boxes = tuple(sorted(box for box in stored.get(name, ()) if volume(box)))
        problems += _problems(name, shape, boxes)
        if len(problems) > SHOWN:
            break
    if problems:
        more = ", and more" if len(problems) > SHOWN else ""
        raise CheckpointError(
            f"{where} does not hold every tensor exactly once: {'; '.join(problems[:SHOWN])}{more}."
        )


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
def _bands(shape: tuple[int, ...], boxes: tuple[Region, ...]) -> Bands:
    """Sweep over the first dim; many tensors of a model are cut alike, hence the cache."""
    if not shape:
        return ((0, 1, len(boxes), len(boxes)),)
    starts: dict[int, list[Region]] = {}
    stops: dict[int, list[Region]] = {}
    for box in boxes:
        starts.setdefault(box[0][0], []).append(box)
        stops.setdefault(box[0][1], []).append(box)
    cuts = sorted({0, shape[0], *starts, *stops})
    bands = []
    active: list[Region] = []
    for start, stop in pairwise(cuts):
        ended = stops.get(start, ())
        if ended:
            active = [box for box in active if box[0][1] != start]
        active += starts.get(start, ())
        if not active:
            bands.append((start, stop, 0, 0))
            continue
        inner = _bands(shape[1:], tuple(sorted(box[1:] for box in active)))
        bands.append((start, stop, min(b[2] for b in inner), max(b[3] for b in inner)))
    return tuple(bands)
